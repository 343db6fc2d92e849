"""Statements that every vote runs, handed to the driver as they are.

SQLAlchemy builds and compiles them once a database; what it does around each execution (contexts, events, types of
parameters and results) took three times as long as SQLite itself, at five statements a vote. So parameters and results
are the driver's own here: JSON is text, and a row is a tuple.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.sql.expression import Executable


class Prepared:
    """A statement of SQLAlchemy's that is compiled once for each database.

    Args:
        statement: with named parameters that hold one value each.
        columns: that an insert sets.
    """

    def __init__(self, statement: Executable, columns: Sequence[str] | None = None) -> None:
        self._statement, self._columns = statement, columns
        self._compiled: dict[str, tuple[str, list[str] | None]] = {}

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """What it gives, in the connection's transaction.

        Args:
            connection: of SQLAlchemy.
            values: of all its parameters.

        Raises:
            Exception: the driver's own; see `refused`.
        """
        sql, order = self._compiled.get(connection.dialect.name) or self._compile(connection)
        cursor = connection.connection.cursor()
        try:
            cursor.execute(sql, values if order is None else [values[name] for name in order])
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            cursor.close()

    def _compile(self, connection: Connection) -> tuple[str, list[str] | None]:
        dialect = connection.dialect
        compiled: Any = self._statement.compile(dialect=dialect, column_keys=self._columns)  # type: ignore[attr-defined]
        order = list(compiled.positiontup) if compiled.positional else None
        self._compiled[dialect.name] = (compiled.string, order)
        return self._compiled[dialect.name]


def refused(connection: Connection) -> type[Exception]:
    """What the connection's driver raises for a row that a constraint refuses."""
    found: type[Exception] = connection.dialect.loaded_dbapi.IntegrityError
    return found
