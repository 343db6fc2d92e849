"""A database to write to so that what is acknowledged stays: its connections, its schema, and transactions that write.

Writers take turns, also those of several processes: SQLite by BEGIN IMMEDIATE, PostgreSQL by an advisory lock, so that
what a transaction reads stays true until its commit, on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

_VERSION_TABLE = "schema_version"
_PATIENCE_SECONDS = 30  # for another process's write to end
_LOCK = 0x616C69676E  # "align": the advisory lock's number, one a database


class StoreError(RuntimeError):
    """The database can't be used; the message says why, and what to do."""


def connect(url: str, create: bool = True) -> Engine:
    """An engine whose commits are on disk when they return, with the schema of this version of alignfast.

    Args:
        url: `sqlite:///feedback.db`, or `postgresql://user@host/database`.
        create: make SQLite's file where there is none.

    Raises:
        StoreError: the address can't be used, the database can't be reached, or its schema is of a later alignfast.
    """
    engine = create_engine(_checked(url, create), pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine)
    else:
        _prepare_postgresql(engine)
    try:
        migrate(engine)
    except StoreError:
        engine.dispose()
        raise
    except Exception as error:
        engine.dispose()
        raise StoreError(f"{engine.url.render_as_string()} can't be opened: {error}") from error
    return engine


def _checked(url: str, create: bool) -> URL:
    try:
        found = make_url(url)
    except ArgumentError as error:
        raise StoreError(
            f"expected an address such as sqlite:///feedback.db or postgresql://user@host/database, got {url!r}"
        ) from error
    if found.drivername in ("postgres", "postgresql"):
        found = found.set(drivername="postgresql+psycopg")
    if found.drivername == "postgresql+psycopg":
        try:
            import psycopg  # noqa: F401 - looked for, to say how to get it
        except ImportError as error:
            raise StoreError(
                f"PostgreSQL needs psycopg ({error}): pip install '.[postgres]' in alignfast's checkout"
            ) from error
        return found
    if found.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise StoreError(f"{found.drivername} is not supported; use sqlite:/// or postgresql://")
    if found.database in (None, "", ":memory:"):
        raise StoreError(f"{url!r} would keep votes in memory alone; give a file: sqlite:///feedback.db")
    file = Path(str(found.database)).resolve()
    if not file.parent.is_dir() or not (create or file.is_file()):
        raise StoreError(f"{url!r}: there is no {'file ' if file.parent.is_dir() else 'folder for '}{file}")
    return found


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver would begin by itself, and only before some statements
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"SQLite can't keep a write-ahead log here (it says {mode!r}); use a local disk")
        # NORMAL may lose acknowledged votes when the power fails
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA busy_timeout={_PATIENCE_SECONDS * 1000}")
        connection.execute("PRAGMA secure_delete=ON")  # what is deleted leaves the file, not the index alone

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_postgresql(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit TO on")  # a server may have it off
            cursor.execute(f"SET lock_timeout TO {_PATIENCE_SECONDS * 1000}")
        connection.commit()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes", False):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other process writes beside."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


def forget(engine: Engine) -> None:
    """Take what was deleted out of SQLite's log too; PostgreSQL's autovacuum sees to it by itself."""
    if engine.dialect.name == "sqlite":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()


def migrate(engine: Engine) -> None:
    """Bring the schema to that of this version of alignfast, in one transaction.

    Raises:
        StoreError: it is of a later version.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with writing(engine) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": _VERSION_TABLE})
        found = context.get_current_revision()
        if found is not None and found not in known:
            raise StoreError(
                f"{engine.url.render_as_string()} has the schema {found} of a later alignfast, this one knows "
                f"{', '.join(sorted(known))}: upgrade alignfast"
            )
        config.attributes.update(connection=connection, version_table=_VERSION_TABLE)
        command.upgrade(config, "head")
