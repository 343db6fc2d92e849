"""What a version's row says more: the share of users that meets it as the canary, and its figures."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add both; versions that are there have neither."""
    op.add_column("versions", sa.Column("share", sa.Double))
    op.add_column("versions", sa.Column("figures", sa.JSON, nullable=False, server_default="{}"))
