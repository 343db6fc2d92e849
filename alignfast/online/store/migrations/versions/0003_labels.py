"""The queue of prompts that annotators rank the answers to."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "label_items",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("place", sa.Integer, nullable=False, index=True),
        sa.Column("prompt", sa.JSON, nullable=False),
        sa.Column("group_id", sa.Text, index=True),
    )
    item = sa.ForeignKey("label_items.id", ondelete="CASCADE")
    op.create_table(
        "label_assignments",
        sa.Column("item", sa.Text, item, primary_key=True),
        sa.Column("user_id", sa.Text, primary_key=True, index=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("skipped", sa.Boolean, nullable=False),
    )
