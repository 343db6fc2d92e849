"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make them all, in the order of their references."""
    _responses()
    _feedback()
    _versions()
    _others()


def _responses() -> None:
    op.create_table(
        "responses",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("created", sa.Double, nullable=False, index=True),
        sa.Column("episode_id", sa.Text, index=True),
        sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("group_id", sa.Text, index=True),
        sa.Column("user_id", sa.Text, index=True),
        sa.Column("prompt", sa.JSON, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("text_hash", sa.Text, nullable=False),
        sa.Column("prompt_ids", sa.LargeBinary, nullable=False),
        sa.Column("completion_ids", sa.LargeBinary, nullable=False),
        sa.Column("logps", sa.LargeBinary, nullable=False),
        sa.Column("sampled_logps", sa.LargeBinary, nullable=False),
        sa.Column("finish_reason", sa.Text, nullable=False),
        sa.Column("sampling", sa.JSON, nullable=False),
        sa.Column("policy_version", sa.Text, nullable=False, index=True),
        sa.Column("weights_hash", sa.Text, nullable=False),
        sa.Column("token_hash", sa.Text, nullable=False),
    )


def _feedback() -> None:
    op.create_table(
        "feedback",
        sa.Column("seq", Number, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("response_id", sa.Text, sa.ForeignKey("responses.id", ondelete="CASCADE"), index=True),
        sa.Column("episode_id", sa.Text, index=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("among", sa.JSON, nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("slot", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("current", sa.Boolean, nullable=False),
        sa.Column("replaces", sa.Text),
        sa.Column("created", sa.Double, nullable=False, index=True),
        sqlite_autoincrement=True,
    )
    op.create_index("feedback_of_user", "feedback", ["user_id", "created"])
    op.create_index(
        "one_current_vote",
        "feedback",
        ["user_id", "target", "slot"],
        unique=True,
        sqlite_where=sa.text("current"),
        postgresql_where=sa.text("current"),
    )
    op.create_table(
        "idempotency",
        sa.Column("caller", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("body_hash", sa.Text, nullable=False),
        sa.Column(
            "feedback",
            Number,
            sa.ForeignKey("feedback.seq", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
    )


def _versions() -> None:
    op.create_table(
        "versions",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("parents", sa.JSON, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("reasons", sa.JSON, nullable=False),
    )
    op.create_table(
        "promotions",
        sa.Column("seq", Number, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("version", sa.Text, sa.ForeignKey("versions.name"), nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "uses",
        sa.Column("version", sa.Text, sa.ForeignKey("versions.name"), primary_key=True),
        sa.Column(
            "feedback",
            Number,
            sa.ForeignKey("feedback.seq", ondelete="CASCADE"),
            primary_key=True,
            index=True,
        ),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_table(
        "prompt_uses",
        sa.Column("version", sa.Text, sa.ForeignKey("versions.name"), primary_key=True),
        sa.Column(
            "response_id",
            sa.Text,
            sa.ForeignKey("responses.id", ondelete="CASCADE"),
            primary_key=True,
            index=True,
        ),
    )


def _others() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("stage", sa.Text, nullable=False),
        sa.Column("state", sa.JSON, nullable=False),
    )
    op.create_table(
        "files",
        sa.Column("host", sa.Text, primary_key=True),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("cleared", Number, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text, nullable=False, index=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("revoked", sa.Double),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "deletions",
        sa.Column("seq", Number, primary_key=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("response_ids", sa.JSON, nullable=False),
        sa.Column("feedback_ids", sa.JSON, nullable=False),
        sa.Column("versions", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
