"""One learner a database, on whichever machine: a lock that goes with the process, or with its connection to the server.

Where a PostgreSQL server restarts, the lock is gone before the learner is: what keeps versions apart then are their names,
which the store gives once.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, text

_KEY = 0x616C6967  # of advisory locks, beside the schema's


class LearnerAtWork(RuntimeError):
    """Another learner is at work."""


@contextmanager
def one_learner(engine: Engine) -> Iterator[None]:
    """Be the only learner of a database meanwhile.

    Raises:
        LearnerAtWork: another one is.
    """
    if engine.dialect.name == "sqlite":
        with locked(Path(f"{engine.url.database}.learner"), "this database"):
            yield
        return
    arguments = f"({_KEY}, hashtext(current_schema()))"
    # Not in a transaction, which would hold up the server's vacuum for as long.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.execute(text(f"SELECT pg_try_advisory_lock{arguments}")).scalar():
            raise LearnerAtWork(_told("this database"))
        try:
            yield
        finally:
            connection.execute(text(f"SELECT pg_advisory_unlock{arguments}"))


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock on a file of this machine.

    Args:
        file: made where there is none.
        what: one is at work on, in the error.

    Raises:
        LearnerAtWork: another process holds it.
    """
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LearnerAtWork(_told(what)) from error
        yield


def _told(what: str) -> str:
    return f"another learner is at work on {what}; `alignfast online status` says how far it is"
