"""Tokens of answers are signed by the server, and nothing of them is kept."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Drop the hashes, which nothing read."""
    op.drop_column("responses", "token_hash")
