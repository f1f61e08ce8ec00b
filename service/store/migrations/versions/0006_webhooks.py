"""Webhooks, what they are still to be told, and what came of telling it."""

import sqlalchemy as sa
from alembic import op

revision = "0006_webhooks"
down_revision = "0005_cursor_keys"


def upgrade() -> None:
    """There are no webhooks yet; those that will be are told of what happens from then on."""
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("topics", sa.Text, nullable=False),
        sa.Column("secret_name", sa.String(128), nullable=False),
        sa.Column("of_all", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("num_deliveries", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("webhooks_by_owner", "webhooks", ["owner", "id"])
    op.create_table(
        "webhook_lanes",
        sa.Column("hook_id", sa.String(64), primary_key=True),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("next_seq", sa.Integer, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("num_failures", sa.Integer, nullable=False),
        sa.Column("failing_since", sa.BigInteger),
        sa.Column("next_try_at", sa.BigInteger, nullable=False),
    )
    op.create_index("webhook_lanes_by_time", "webhook_lanes", ["hook_id", "next_try_at"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("hook_id", sa.String(64), sa.ForeignKey("webhooks.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("time", sa.BigInteger, nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("job_id", sa.String(64)),
        sa.Column("seq", sa.Integer),
        sa.Column("status", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("duration_s", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Remove them, and whatever was not told yet."""
    for table in ("webhook_deliveries", "webhook_lanes", "webhooks"):
        op.drop_table(table)
