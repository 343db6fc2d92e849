"""Keys and tokens: good for their holder, hashed, revoked, and never told apart by what a wrong one does."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from alignfast.online.store import Store, tables


def test_a_key_is_good_until_it_is_revoked(store: Store) -> None:
    assert not store.keys.any()
    key, made = store.keys.make("ada", "annotator")
    other, _ = store.keys.make("ada")
    assert store.keys.check(key) == made
    assert (made.user, made.role) == ("ada", "annotator")
    store.keys.revoke(made.id)
    assert store.keys.check(key) is None
    assert store.keys.check(other) is not None
    assert [found.revoked is None for found in store.keys.all()] == [False, True]
    assert store.keys.any()
    with pytest.raises(ValueError, match="no key"):
        store.keys.revoke(made.id)


def test_wrong_keys(store: Store) -> None:
    key, _ = store.keys.make("ada")
    prefix, id, secret = key.split("_", 2)
    other = store.keys.make("bob")[0].split("_", 2)
    wrong = [
        "",
        "_",
        key[:-1],
        key + "a",
        f"{prefix}_{id}_",
        f"{prefix}_{id}_{other[2]}",
        f"ag_{id}_{secret}",
    ]
    for guess in [*wrong, f"{prefix}__{secret}", secret, "af_\0_x", "ü" * 50, "\ud800", key.upper()]:
        assert store.keys.check(guess) is None, guess


def test_only_salted_hashes_are_stored(store: Store) -> None:
    keys = [store.keys.make("ada")[0] for _ in range(2)]
    with store.read() as connection:
        rows = list(connection.execute(select(tables.keys)))
    assert len({bytes(row.salt) for row in rows}) == 2
    for key, row in zip(keys, rows):
        secret = key.split("_", 2)[2]
        assert all(secret not in str(value) and secret.encode() != value for value in row)


@pytest.mark.parametrize(
    ("user", "role"), [("", "user"), ("anonymous:1", "user"), ("a\0", "user"), ("ada", "root")]
)
def test_keys_that_are_not_made(store: Store, user: str, role: str) -> None:
    with pytest.raises(ValueError, match=r"a key: user must|who votes without a key|a key's role must"):
        store.keys.make(user, role)  # type: ignore[arg-type]
