"""The audit trail may lose entries of before a time that was written down first; nothing else of it may go."""

import sqlalchemy as sa
from alembic import op

revision = "0007_audit_floor"
down_revision = "0006_webhooks"

_GUARD = {
    "sqlite": (
        "DROP TRIGGER audit_refuses_delete",
        "CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit "
        "WHEN NOT EXISTS (SELECT 1 FROM audit_floor WHERE OLD.time < kept_from) "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF TG_OP = 'DELETE' AND EXISTS (SELECT 1 FROM audit_floor WHERE OLD.time < kept_from) "
        "THEN RETURN OLD; END IF; "
        "RAISE EXCEPTION 'the audit trail is only added to'; END $$",
    ),
}
_FORMER_GUARD = {
    "sqlite": (
        "DROP TRIGGER audit_refuses_delete",
        "CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN RAISE EXCEPTION 'the audit trail is only added to'; END $$",
    ),
}


def upgrade() -> None:
    """No time is written down yet: all that is there may not be removed."""
    op.create_table(
        "audit_floor",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kept_from", sa.BigInteger, nullable=False),
    )
    op.create_index("audit_by_time", "audit", ["time"])
    for statement in _GUARD.get(op.get_bind().dialect.name, ()):
        op.execute(statement)


def downgrade() -> None:
    """Nothing may be removed again."""
    for statement in _FORMER_GUARD.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
    op.drop_index("audit_by_time", "audit")
    op.drop_table("audit_floor")
