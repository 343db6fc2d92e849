"""The store's tables, as they are now; migrations/ says how a database of an earlier version gets there.

    responses      answers as they were shown           feedback       every vote ever, the current ones marked
    versions       of policies and reward models        promotions     which one served since when
    uses           which feedback a version has used    prompt_uses    whose prompts it was sampled for
    runs           learner runs and their stage         idempotency    requests that were answered
    keys           API keys, hashed                     secrets        of this installation, to sign with
    label_items    prompts to rank answers to           label_assignments   and in whose hands they are
    files          exports, replays and samples that hold rows of these
    deletions      ids of what was deleted, for those files to follow, and which versions had been trained on it

Times are seconds since 1970.
"""

from __future__ import annotations

import sys
from array import array
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeDecorator

metadata = MetaData()
# 8 bytes in PostgreSQL; in SQLite only INTEGER counts up by itself, and has 8 bytes too.
Number = BigInteger().with_variant(Integer, "sqlite")


class Numbers(TypeDecorator[tuple[Any, ...]]):
    """A tuple of numbers as its bytes, little-endian: a third of their size in JSON, and exact.

    Args:
        code: of `array`: `i` for tokens, `d` for log-probs.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code

    def process_bind_param(self, value: Any, dialect: Any) -> bytes:
        """Bytes for the database."""
        return _little(array(self.code, value or ())).tobytes()

    def process_result_value(self, value: Any, dialect: Any) -> tuple[Any, ...]:
        """Numbers from the database."""
        numbers = array(self.code)
        numbers.frombytes(value)
        return tuple(_little(numbers))


def _little(numbers: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


responses = Table(
    "responses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("created", Double, nullable=False, index=True),
    Column("episode_id", Text, index=True),
    Column("turn", Integer, nullable=False),
    Column("group_id", Text, index=True),
    Column("user_id", Text, index=True),
    Column("prompt", JSON, nullable=False),
    Column("text", Text, nullable=False),
    Column("text_hash", Text, nullable=False),
    Column("prompt_ids", Numbers("i"), nullable=False),
    Column("completion_ids", Numbers("i"), nullable=False),
    Column("logps", Numbers("d"), nullable=False),
    Column("sampled_logps", Numbers("d"), nullable=False),
    Column("finish_reason", Text, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("policy_version", Text, nullable=False, index=True),
    Column("weights_hash", Text, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    Column("seq", Number, primary_key=True),  # in the order of commits: writers take turns
    Column("id", Text, nullable=False, unique=True),
    Column("response_id", Text, ForeignKey("responses.id", ondelete="CASCADE"), index=True),
    Column("episode_id", Text, index=True),
    Column("kind", Text, nullable=False),
    Column("value", JSON, nullable=False),
    Column("among", JSON, nullable=False),
    Column("comment", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("slot", Text, nullable=False),  # the last vote of a user on a target in a slot is current
    Column("target", Text, nullable=False),
    Column("current", Boolean, nullable=False),
    Column("replaces", Text),
    Column("created", Double, nullable=False, index=True),
    Index("feedback_of_user", "user_id", "created"),
    Index(
        "one_current_vote",
        "user_id",
        "target",
        "slot",
        unique=True,
        sqlite_where=text("current"),
        postgresql_where=text("current"),
    ),
    sqlite_autoincrement=True,  # a number is never given again, also after the newest vote was deleted
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("caller", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_hash", Text, nullable=False),
    Column("feedback", Number, ForeignKey("feedback.seq", ondelete="CASCADE"), nullable=False, index=True),
)

versions = Table(
    "versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Column("parents", JSON, nullable=False),
    Column("created", Double, nullable=False),
    Column("status", Text, nullable=False),
    Column("reasons", JSON, nullable=False),
    Column("share", Double),  # of the users who meet it as the canary
    Column("figures", JSON, nullable=False),
)

promotions = Table(
    "promotions",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("version", Text, ForeignKey("versions.name"), nullable=False),
    Column("action", Text, nullable=False),
    Column("created", Double, nullable=False),
    sqlite_autoincrement=True,
)

uses = Table(
    "uses",
    metadata,
    Column("version", Text, ForeignKey("versions.name"), primary_key=True),
    Column("feedback", Number, ForeignKey("feedback.seq", ondelete="CASCADE"), primary_key=True, index=True),
    Column("created", Double, nullable=False),
)

prompt_uses = Table(
    "prompt_uses",
    metadata,
    Column("version", Text, ForeignKey("versions.name"), primary_key=True),
    Column("response_id", Text, ForeignKey("responses.id", ondelete="CASCADE"), primary_key=True, index=True),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("status", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("state", JSON, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("host", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("cleared", Number, nullable=False),  # the last deletion that the file has followed
)

label_items = Table(
    "label_items",
    metadata,
    Column("id", Text, primary_key=True),
    Column("place", Integer, nullable=False, index=True),
    Column("prompt", JSON, nullable=False),
    Column("group_id", Text, index=True),  # no reference: answers may be deleted, and are then drawn anew
)

label_assignments = Table(
    "label_assignments",
    metadata,
    Column("item", Text, ForeignKey("label_items.id", ondelete="CASCADE"), primary_key=True),
    Column("user_id", Text, primary_key=True, index=True),
    Column("created", Double, nullable=False),
    Column("skipped", Boolean, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("user_id", Text, nullable=False, index=True),
    Column("role", Text, nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("created", Double, nullable=False),
    Column("revoked", Double),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

deletions = Table(
    "deletions",
    metadata,
    Column("seq", Number, primary_key=True),
    Column("created", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("response_ids", JSON, nullable=False),
    Column("feedback_ids", JSON, nullable=False),
    Column("versions", JSON, nullable=False),
    sqlite_autoincrement=True,
)
