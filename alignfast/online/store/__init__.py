"""Answers, votes, versions and runs in SQLite or PostgreSQL."""

try:
    from alignfast.online.store.database import StoreError
    from alignfast.online.store.keys import Key, Keys
    from alignfast.online.store.store import Store
    from alignfast.online.store.versions import Run, Runs, Version, Versions
    from alignfast.online.store.voting import Kept
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("sqlalchemy", "alembic"):
        raise
    raise RuntimeError(
        f"the feedback store is missing its database ({error}): pip install '.[serve]' in alignfast's checkout"
    ) from error

__all__ = ["Kept", "Key", "Keys", "Run", "Runs", "Store", "StoreError", "Version", "Versions"]
