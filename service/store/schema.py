"""The tables, and the column types that keep times and non-finite numbers exact on every database."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    false,
)
from sqlalchemy.types import TypeDecorator

SCHEMA_VERSION = 2
"""What ``schema_version`` holds for good: services from before there were migrations refuse any number but 1."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class UtcTime(TypeDecorator[datetime]):
    """An aware time, kept as whole microseconds since the epoch: exact, sortable, the same everywhere."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Microseconds since the epoch."""
        return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """Back to a time in UTC."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


class Measure(TypeDecorator[float]):
    """A measured number that may be NaN, which is kept as NULL because SQLite has none; infinities stay as they are."""

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """NULL for NaN."""
        return None if value is None or math.isnan(value) else value

    def process_result_value(self, value: Any | None, dialect: Dialect) -> float:
        """NaN for NULL."""
        return math.nan if value is None else float(value)


class Words(TypeDecorator[str]):
    """Text from outside; what cannot be stored as UTF-8 (lone surrogates, NUL) becomes U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Storable text."""
        if value is None:
            return None
        return value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False, server_default="anonymous"),
    Column("name", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("state", String(16), nullable=False),
    Column("state_since", UtcTime, nullable=False),
    Column("phase", String(32)),
    Column("reason", String(32)),
    Column("detail", Words, nullable=False),
    Column("queue_position", Integer),
    Column("stop_saves", Boolean, nullable=False, server_default=false()),
    Column("attempt", Integer, nullable=False),
    Column("retry_of", String(64)),
    Column("start_checkpoint", Text),
    Column("checkpoint_requests", Integer, nullable=False, server_default="0"),
    Column("progress", Text),
    Column("version", Integer, nullable=False),
    Column("num_events", Integer, nullable=False),
    Column("num_logs", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("observed_at", UtcTime),
    Column("heartbeat_at", UtcTime),
    Index("jobs_by_age", "created_at", "id"),
    Index("jobs_by_state", "state", "created_at", "id"),
    Index("jobs_by_owner", "owner", "created_at", "id"),
)

cursor_keys = Table(
    "cursor_keys",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("key", LargeBinary, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("spec_sha256", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", Text),
    Column("token", Integer, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("token_sha256", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("heartbeat_at", UtcTime),
    Column("ended", Text),
)

ranks = Table(
    "ranks",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("received", Text, nullable=False),
    Column("started", Boolean, nullable=False),
    Column("last_step", Integer, nullable=False),
    ForeignKeyConstraint(["job_id", "attempt"], ["attempts.job_id", "attempts.number"]),
)

events = Table(
    "events",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time", UtcTime, nullable=False),
    Column("type", String(32), nullable=False),
    Column("attempt", Integer),
    Column("rank", Integer),
    Column("body", Text, nullable=False),
    Index("events_by_type", "job_id", "type", "seq"),
)

logs = Table(
    "logs",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time", UtcTime, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("level", String(16), nullable=False),
    Column("text", Words, nullable=False),
)

steps = Table(
    "steps",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("loss", Measure),
    Column("learning_rate", Measure),
    Column("step_s", Measure),
    # The rows lie in the order in which they are read, step by step; databases other than SQLite ignore this.
    sqlite_with_rowid=False,
)

metric_chunks = Table(
    "metric_chunks",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("rank", Integer, primary_key=True, autoincrement=False),
    Column("first_step", Integer, primary_key=True, autoincrement=False),
    Column("last_step", Integer, nullable=False),
    Column("num_rows", Integer, nullable=False),
    Column("first_attempt", Integer, nullable=False),
    Column("step", LargeBinary, nullable=False),
    Column("attempt", LargeBinary, nullable=False),
    Column("epoch", LargeBinary, nullable=False),
    Column("loss", LargeBinary, nullable=False),
    Column("learning_rate", LargeBinary, nullable=False),
    Column("step_s", LargeBinary, nullable=False),
    # Finds at once that no chunk reaches as far as the newest steps, which each ingest asks.
    Index("metric_chunks_by_end", "job_id", "last_step"),
)

layer_samples = Table(
    "layer_samples",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    # A JSON document, compressed by zlib.
    Column("body", LargeBinary, nullable=False),
)

forgotten = Table(
    "forgotten",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("what", String(16), primary_key=True),
    Column("at", UtcTime, nullable=False),
    Column("complete", Boolean, nullable=False),
)

principals = Table(
    "principals",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("max_running_workers", Integer),
    Column("max_queued_jobs", Integer),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("principal", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("last_used_at", UtcTime),
    Index("api_keys_by_principal", "principal", "id"),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("time", UtcTime, nullable=False),
    Column("principal", String(64)),
    Column("key_id", String(64)),
    Column("address", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Words, nullable=False),
    Column("detail", Words, nullable=False),
    Column("status", Integer, nullable=False),
    Column("code", String(64)),
    Column("request_id", String(64), nullable=False),
    Index("audit_by_principal", "principal", "seq"),
    Index("audit_by_time", "time"),
)

audit_floor = Table(
    "audit_floor",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("kept_from", UtcTime, nullable=False),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("topics", Text, nullable=False),
    Column("secret_name", String(128), nullable=False),
    Column("of_all", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("num_deliveries", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Index("webhooks_by_owner", "owner", "id"),
)

# What is still to be told: of each job, to each webhook, the events from next_seq to last_seq that it wants. No key
# refers to the webhook, so that whoever removes one never waits for an ingest, or an ingest for them.
webhook_lanes = Table(
    "webhook_lanes",
    metadata,
    Column("hook_id", String(64), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("next_seq", Integer, nullable=False),
    Column("last_seq", Integer, nullable=False),
    Column("num_failures", Integer, nullable=False),
    Column("failing_since", UtcTime),
    Column("next_try_at", UtcTime, nullable=False),
    Index("webhook_lanes_by_time", "hook_id", "next_try_at"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("hook_id", ForeignKey("webhooks.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time", UtcTime, nullable=False),
    Column("event", String(32), nullable=False),
    Column("job_id", String(64)),
    Column("seq", Integer),
    Column("status", Integer),
    Column("error", Words),
    Column("duration_s", Measure, nullable=False),
)

_AUDIT_KEEPERS = {
    "sqlite": (
        "CREATE TRIGGER audit_refuses_update BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END",
        "CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit "
        "WHEN NOT EXISTS (SELECT 1 FROM audit_floor WHERE OLD.time < kept_from) "
        "BEGIN SELECT RAISE(ABORT, 'the audit trail is only added to'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION audit_refuses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF TG_OP = 'DELETE' AND EXISTS (SELECT 1 FROM audit_floor WHERE OLD.time < kept_from) "
        "THEN RETURN OLD; END IF; "
        "RAISE EXCEPTION 'the audit trail is only added to'; END $$",
        "CREATE TRIGGER audit_refuses BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_refuses()",
    ),
}
"""What makes the database itself refuse to change the audit trail, save for what lies below its written floor."""

for _dialect, _statements in _AUDIT_KEEPERS.items():
    for _statement in _statements:
        _keeper = DDL(_statement)  # type: ignore[no-untyped-call]
        event.listen(audit, "after_create", _keeper.execute_if(dialect=_dialect))
