"""Samples of BatchNorm layers lie in a table of their own, no longer among the events."""

import sqlalchemy as sa
from alembic import op

revision = "0008_layer_samples"
down_revision = "0007_audit_floor"


def upgrade() -> None:
    """Samples that were told before stay the events that they are: events keep their numbers."""
    op.create_table(
        "layer_samples",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Remove them."""
    op.drop_table("layer_samples")
