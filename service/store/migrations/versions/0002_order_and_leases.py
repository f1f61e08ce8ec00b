"""Owners, order and ways to stop for jobs; idempotency keys per owner; leases."""

import sqlalchemy as sa
from alembic import op

revision = "0002_order_and_leases"
down_revision = "0001_baseline"

_ADDED = (
    "owner",
    "priority",
    "state_since",
    "queue_position",
    "stop_saves",
    "retry_of",
    "start_checkpoint",
    "checkpoint_requests",
)


def upgrade() -> None:
    """Jobs that are there belong to nobody in particular; their state is as old as its newest event says."""
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("owner", sa.String(64), nullable=False, server_default="anonymous"))
        jobs.add_column(sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("state_since", sa.BigInteger))
        jobs.add_column(sa.Column("queue_position", sa.Integer))
        jobs.add_column(sa.Column("stop_saves", sa.Boolean, nullable=False, server_default=sa.false()))
        jobs.add_column(sa.Column("retry_of", sa.String(64)))
        jobs.add_column(sa.Column("start_checkpoint", sa.Text))
        jobs.add_column(sa.Column("checkpoint_requests", sa.Integer, nullable=False, server_default="0"))
    newest = "SELECT max(time) FROM events WHERE events.job_id = jobs.id AND events.type = 'state_changed'"
    op.execute(f"UPDATE jobs SET state_since = coalesce(({newest}), updated_at)")  # noqa: S608
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("state_since", existing_type=sa.BigInteger, nullable=False)
        jobs.create_index("jobs_by_owner", ["owner", "created_at", "id"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("holder", sa.Text),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    op.execute("CREATE TABLE keys_kept AS SELECT * FROM idempotency_keys")
    op.drop_table("idempotency_keys")
    _create_keys(sa.Column("owner", sa.String(64), primary_key=True))
    op.execute("INSERT INTO idempotency_keys SELECT 'anonymous', key, job_id, spec_sha256, created_at FROM keys_kept")
    op.drop_table("keys_kept")
    op.execute("UPDATE schema_version SET version = 2")


def downgrade() -> None:
    """Of a key that several owners used the first of them keeps it."""
    op.execute("CREATE TABLE keys_kept AS SELECT * FROM idempotency_keys")
    op.drop_table("idempotency_keys")
    _create_keys()
    op.execute(
        "INSERT INTO idempotency_keys SELECT key, job_id, spec_sha256, created_at FROM keys_kept "
        "WHERE owner = (SELECT min(owner) FROM keys_kept AS other WHERE other.key = keys_kept.key)"
    )
    op.drop_table("keys_kept")
    op.drop_table("leases")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("jobs_by_owner")
        for column in _ADDED:
            jobs.drop_column(column)
    op.execute("UPDATE schema_version SET version = 1")


def _create_keys(*owner: sa.Column[str]) -> None:
    # A table made anew, because its primary key changes: the way that is the same on every database.
    op.create_table(
        "idempotency_keys",
        *owner,
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("spec_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
