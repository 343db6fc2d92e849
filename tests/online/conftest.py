"""Each test of the store on SQLite and on PostgreSQL, whose private cluster is started from Debian's binaries."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignfast.online.store import Store


def _binaries() -> Path | None:
    """Where initdb and pg_ctl are; Debian keeps them out of PATH, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    path = found[-1] if found else shutil.which("initdb")
    return None if path is None else Path(path).resolve().parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The folder of a running cluster's socket."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    owner = None
    if os.getuid() == 0:  # the server refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        owner = "postgres" if "postgres" in names else "nobody"
    # not below pytest's folder, which nobody but this user may enter; short, for a socket's path has 107 characters
    folder = Path(tempfile.mkdtemp(prefix="alignfast-pg-", dir="/tmp"))
    if owner is not None:
        shutil.chown(folder, owner)

    def run(program: str, *words: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *words]
        done = subprocess.run(command, user=owner, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        # no fsync: what is killed in these tests is a client, never the server
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield str(folder)
        run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/feedback.db"
    import psycopg

    # a schema, not a database, which would be copied from 300 files
    folder, name = request.getfixturevalue("cluster"), f"test_{next(_numbers)}"
    with psycopg.connect(f"host={folder} user=postgres dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"postgresql://postgres@/postgres?host={folder}&options=-csearch_path%3D{name}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        yield opened
