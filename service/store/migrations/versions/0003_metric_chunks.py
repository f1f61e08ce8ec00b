"""Metrics in chunks beside the rows, and what of which job has been forgotten."""

import math
import struct
import zlib
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0003_metric_chunks"
down_revision = "0002_order_and_leases"

_FORMATS = {"step": "i", "attempt": "i", "epoch": "i", "loss": "d", "learning_rate": "d", "step_s": "d"}


def upgrade() -> None:
    """Metrics that are there stay rows; they become chunks as their jobs tell more."""
    op.create_table(
        "metric_chunks",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("rank", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("first_step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last_step", sa.Integer, nullable=False),
        sa.Column("num_rows", sa.Integer, nullable=False),
        sa.Column("first_attempt", sa.Integer, nullable=False),
        sa.Column("step", sa.LargeBinary, nullable=False),
        sa.Column("attempt", sa.LargeBinary, nullable=False),
        sa.Column("epoch", sa.LargeBinary, nullable=False),
        sa.Column("loss", sa.LargeBinary, nullable=False),
        sa.Column("learning_rate", sa.LargeBinary, nullable=False),
        sa.Column("step_s", sa.LargeBinary, nullable=False),
    )
    op.create_index("metric_chunks_by_end", "metric_chunks", ["job_id", "last_step"])
    op.create_table(
        "forgotten",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("what", sa.String(16), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
    )


def downgrade() -> None:
    """Whatever is in chunks becomes rows again."""
    _chunks_to_rows()
    op.drop_table("forgotten")
    op.drop_table("metric_chunks")


def _chunks_to_rows() -> None:
    connection = op.get_bind()
    names = ("job_id", "rank", *_FORMATS)
    steps = sa.table("steps", *(sa.column(name) for name in names))
    chunks = sa.table("metric_chunks", sa.column("first_step"), *(sa.column(name) for name in names))
    c = chunks.c
    for key in connection.execute(sa.select(c.job_id, c.rank, c.first_step)).all():
        this = (c.job_id == key.job_id, c.rank == key.rank, c.first_step == key.first_step)
        row = connection.execute(sa.select(*(c[name] for name in _FORMATS)).where(*this)).one()
        columns = [_numbers(getattr(row, name), form) for name, form in _FORMATS.items()]
        rows = [dict(zip(names, (key.job_id, key.rank, *values), strict=True)) for values in zip(*columns, strict=True)]
        connection.execute(sa.insert(steps), rows)


def _numbers(blob: bytes, form: str) -> Iterator[float | None]:
    """The numbers of a packed column; NULL for NaN, as rows have it."""
    planes = zlib.decompress(blob)
    size = struct.calcsize(form)
    count = len(planes) // size
    numbers = bytes(planes[byte * count + i] for i in range(count) for byte in range(size))
    return (None if math.isnan(number) else number for (number,) in struct.iter_unpack(f"<{form}", numbers))
