"""The key that seals cursors; cursors from before are refused, and a list is begun anew."""

import sqlalchemy as sa
from alembic import op

revision = "0005_cursor_keys"
down_revision = "0004_principals"


def upgrade() -> None:
    """The key itself is made when the service first needs it."""
    op.create_table(
        "cursor_keys",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Remove it."""
    op.drop_table("cursor_keys")
