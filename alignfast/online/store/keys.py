"""API keys: made here, shown once, kept as hashes.

    af_ID_SECRET        the id finds the row; sha256(salt + SECRET) is compared in constant time

Secrets are 256 random bits, so that a fast hash does: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from sqlalchemy import Connection, insert, select, update

from alignfast.online.feedback import ANONYMOUS, check_id, storable, voter_of
from alignfast.online.store.tables import keys

if TYPE_CHECKING:
    from alignfast.online.store.store import Store

Role: TypeAlias = Literal["user", "annotator", "admin"]

_PREFIX = "af"
_SALT_BYTES = 16


@dataclass(frozen=True)
class Key:
    """What is known of an API key; the key itself is not.

    Attributes:
        id: part of the key, by which it is listed and revoked.
        user: whose votes come with it.
        role: what it opens: user, annotator (the labelling queue too) or admin (everything).
        created: seconds since 1970.
        revoked: when it stopped to open anything; None: it does.
    """

    id: str
    user: str
    role: Role
    created: float
    revoked: float | None = None


class Keys:
    """The API keys of a store: `store.keys`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def make(self, user: str, role: Role = "user") -> tuple[str, Key]:
        """A new key, which nobody can show again.

        Raises:
            ValueError: the role is unknown, or the user's name is that of the anonymous.
        """
        if role not in get_args(Role):
            raise ValueError(f"a key's role must be one of {', '.join(get_args(Role))}, got {role!r}")
        check_id(user, "user", "a key")
        if voter_of(user) == ANONYMOUS:
            raise ValueError(f"{user!r} is who votes without a key: name the key's user")
        # hex: an id must not hold the underscore that ends it
        id, secret, salt = secrets.token_hex(8), secrets.token_urlsafe(32), secrets.token_bytes(_SALT_BYTES)
        made = Key(id, user, role, time.time())
        row = {"id": id, "user_id": user, "role": role, "created": made.created}
        row.update(salt=salt, hash=_hash(salt, secret))
        self._store.write(lambda connection: connection.execute(insert(keys).values(**row)))
        return f"{_PREFIX}_{id}_{secret}", made

    def check(self, key: str) -> Key | None:
        """Whose a key is; None for one that is wrong or revoked. The time it takes tells nothing of the secret."""
        prefix, _, rest = key.partition("_")
        id, _, secret = rest.partition("_")
        with self._store.read() as connection:
            row = connection.execute(select(keys).where(keys.c.id == storable(id))).one_or_none()
        salt, expected = (
            (bytes(_SALT_BYTES), bytes(32)) if row is None else (bytes(row.salt), bytes(row.hash))
        )
        fits = hmac.compare_digest(_hash(salt, secret), expected)
        if not fits or row is None or row.revoked is not None or prefix != _PREFIX:
            return None
        return Key(row.id, row.user_id, row.role, row.created)

    def revoke(self, id: str) -> None:
        """Make a key open nothing from now on.

        Raises:
            ValueError: there is no such key, or it was revoked before.
        """
        statement = update(keys).where(keys.c.id == id, keys.c.revoked.is_(None))

        def work(connection: Connection) -> None:
            if not connection.execute(statement.values(revoked=time.time())).rowcount:
                raise ValueError(
                    f"there is no key {id!r} that opens anything; `alignfast keys list` shows their ids"
                )

        self._store.write(work)

    def opens(self, id: str) -> bool:
        """Whether the key with an id is there and not revoked."""
        statement = select(keys.c.id).where(keys.c.id == storable(id), keys.c.revoked.is_(None))
        with self._store.read() as connection:
            return connection.execute(statement).first() is not None

    def any(self) -> bool:
        """Whether any key opens anything."""
        with self._store.read() as connection:
            return (
                connection.execute(select(keys.c.id).where(keys.c.revoked.is_(None)).limit(1)).first()
                is not None
            )

    def all(self) -> list[Key]:
        """Every key ever made, the oldest first."""
        with self._store.read() as connection:
            rows = connection.execute(select(keys).order_by(keys.c.created))
            return [Key(row.id, row.user_id, row.role, row.created, row.revoked) for row in rows]


def _hash(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode("utf-8", "replace")).digest()
