"""A database to write to so that what is acknowledged stays: connections, schema, and one thread that writes.

    caller 1 --.                       begin
    caller 2 ---+-> queue -> batch ->  caller 1's statements     -> commit -> every caller of the batch is answered
    caller 3 --'                       caller 2's statements ...

A commit to disk takes milliseconds, whatever is in it: while one is under way the next batch gathers, and nobody waits
for more to come. Where one of a batch fails, all of it is done again with a savepoint before each, which costs a third
of the rate: so what is to be written must give the same when it is begun again. Writers of several processes take turns: SQLite by BEGIN IMMEDIATE, PostgreSQL by an advisory lock, so
that what a transaction reads stays true until its commit, on both.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

Result = TypeVar("Result")
AnyFuture = TypeVar("AnyFuture", Future[Any], asyncio.Future[Any])
_Asked: TypeAlias = "tuple[Callable[[Connection], Any], Future[Any] | asyncio.Future[Any]]"
_Answer: TypeAlias = "tuple[Future[Any] | asyncio.Future[Any], Any, BaseException | None]"

_VERSION_TABLE = "schema_version"
_MAX_BATCH = 256  # callers of one commit
_PATIENCE_SECONDS = 30  # for another process's write to end
_LOCK = 0x616C69676E  # "align": the advisory lock's number, one a database
_STOP = None


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
        connection.execute(
            "PRAGMA synchronous=FULL"
        )  # NORMAL may lose acknowledged votes when the power fails
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


class _OneByOne(Exception):
    """Something in a batch failed before its commit."""


class Writer:
    """The one thread of this process that writes to a database.

    Args:
        engine: of `connect`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._pid = engine, os.getpid()
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # between a call and the end
        self._thread = threading.Thread(target=self._run, name="alignfast-store", daemon=True)
        self._thread.start()

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """What `work` returns, once all it did is on disk; nothing of it is done if it raises.

        Args:
            work: its statements, on the connection that it is given; it may be called a second time.

        Raises:
            StoreError: the store is closed, or was opened before this process was forked.
        """
        return self.submit(work).result()

    def submit(self, work: Callable[[Connection], Result]) -> Future[Result]:
        """`write` without waiting.

        Raises:
            StoreError: as `write`.
        """
        return self._ask(work, Future())

    def submit_from_loop(self, work: Callable[[Connection], Result]) -> asyncio.Future[Result]:
        """`submit` from a coroutine, whose loop is woken once for all of a batch. To cancel it takes nothing back.

        Raises:
            StoreError: as `write`.
        """
        return self._ask(work, asyncio.get_running_loop().create_future())

    def _ask(self, work: Callable[[Connection], Result], future: AnyFuture) -> AnyFuture:
        if os.getpid() != self._pid:
            raise StoreError("a store does not survive a fork: open one in each process")
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed")
            self._queue.put((work, future))
        return future

    def close(self) -> None:
        """End after what was asked for; a second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed and os.getpid() == self._pid:
            self._queue.put(_STOP)
            self._thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not _STOP:
            batch = [first]
            while len(batch) < _MAX_BATCH and not self._queue.empty():
                following = self._queue.get()
                if following is _STOP:
                    self._queue.put(_STOP)
                    break
                batch.append(following)
            # from here on nobody can cancel: a future that refuses its result would end this thread
            self._commit([one for one in batch if _begins(one[1])])

    def _commit(self, batch: list[_Asked]) -> None:
        """One transaction for all, in which each succeeds or fails by itself."""
        try:
            with writing(self._engine) as connection:
                try:
                    results = [work(connection) for work, _ in batch]
                except Exception as error:
                    raise _OneByOne from error
        except _OneByOne:
            self._commit_each(batch)
            return
        except BaseException as error:  # of the commit, which may have been made: not to be tried again
            _answer([(future, None, error) for _, future in batch])
            return
        _answer([(future, result, None) for (_, future), result in zip(batch, results)])

    def _commit_each(self, batch: list[_Asked]) -> None:
        """The same with a savepoint before each, to which one that fails goes back."""
        answers: list[_Answer] = []
        try:
            with writing(self._engine) as connection:
                for work, future in batch:
                    try:
                        with connection.begin_nested():
                            answers.append((future, work(connection), None))
                    except Exception as error:
                        answers.append((future, None, error))
        except BaseException as error:  # no commit: nobody is told that it was one
            answers = [(future, None, error) for _, future in batch]
        _answer(answers)


def _begins(future: Future[Any] | asyncio.Future[Any]) -> bool:
    """Whether its work shall still be done; from then on a thread can't cancel it."""
    return not isinstance(future, Future) or future.set_running_or_notify_cancel()


def _answer(answers: Sequence[_Answer]) -> None:
    """Tell those who wait in threads at once, and those who wait in a loop by one call of it."""
    in_loops: dict[asyncio.AbstractEventLoop, list[_Answer]] = {}
    for future, result, error in answers:
        if not isinstance(future, Future):
            in_loops.setdefault(future.get_loop(), []).append((future, result, error))
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
    for loop, told in in_loops.items():
        with suppress(RuntimeError):  # the loop has ended, and all that waited in it
            loop.call_soon_threadsafe(_answer_here, told)


def _answer_here(answers: Sequence[_Answer]) -> None:
    for future, result, error in answers:
        if future.done():  # who waited has left
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
