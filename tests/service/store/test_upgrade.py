"""From every schema there ever was to the one that the code knows, and back, on both databases."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.pool import NullPool

from service.errors import StoreUnavailable
from service.jobs import JobState
from service.store import JobStore
from service.store.schema import metadata
from service.store.upgrade import BASELINE, migrations
from tests.postgresql import PostgresServer
from tests.service.store.telling import spec

BORN = datetime(2026, 1, 2, tzinfo=UTC)


class Place:
    """An empty database, as the service opens it and as anyone else may."""

    def __init__(self, engine: Engine, open_store: Callable[[], JobStore]) -> None:
        self.engine = engine
        self.open = open_store

    def run(self, query: str) -> list[tuple[Any, ...]]:
        with self.engine.begin() as connection:
            result = connection.execute(text(query))
            return [tuple(row) for row in result] if result.returns_rows else []


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        path = tmp_path / "jobs.sqlite"
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        yield Place(engine, lambda: JobStore.open(path))
    else:
        server: PostgresServer = request.getfixturevalue("postgresql")
        url = server.url(server.new_database())
        raw = url.get_secret_value().replace("postgresql:", "postgresql+psycopg:")
        engine = create_engine(raw, poolclass=NullPool)
        yield Place(engine, lambda: JobStore.connect(url))
    engine.dispose()


def tables(connection: Connection) -> dict[str, Any]:
    """Every table as the database itself describes it."""
    found = inspect(connection)
    return {
        name: (
            sorted((c["name"], str(c["type"]), c["nullable"], c["default"]) for c in found.get_columns(name)),
            found.get_pk_constraint(name)["constrained_columns"],
            sorted((i["name"], i["column_names"], i["unique"]) for i in found.get_indexes(name)),
            sorted((k["constrained_columns"], k["referred_table"]) for k in found.get_foreign_keys(name)),
        )
        for name in found.get_table_names()
    }


def test_the_steps_make_the_tables_that_the_code_declares_and_each_goes_back(place: Place) -> None:
    revisions = [step.revision for step in ScriptDirectory.from_config(migrations()).walk_revisions()]
    place.open().close()
    with place.engine.begin() as connection:
        fresh = tables(connection)
        metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    seen: dict[str, dict[str, Any]] = {}
    with place.engine.begin() as connection:
        for revision in reversed(revisions):
            command.upgrade(migrations(connection), revision)
            seen[revision] = tables(connection)
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert seen[revisions[0]] == fresh
    for revision in revisions[1:]:
        with place.engine.begin() as connection:
            command.downgrade(migrations(connection), revision)
            assert tables(connection) == seen[revision]
    with place.engine.begin() as connection:
        command.downgrade(migrations(connection), "base")
        assert list(tables(connection)) == ["alembic_version"]


def remember_the_past(place: Place) -> None:
    """A database as services left it before there were migrations: one job that runs, made under a key."""
    spec_json, sha = spec().model_dump_json(), "0" * 64
    born = int(BORN.timestamp() * 1e6)
    with place.engine.begin() as connection:
        command.upgrade(migrations(connection), BASELINE)
        connection.execute(text("DROP TABLE alembic_version"))
        job = "INSERT INTO jobs (id, name, spec, state, detail, attempt, version, num_events, num_logs, created_at, "
        values = "VALUES ('job_old', 'digits', :spec, 'running', '', 1, 3, 2, 0, :born, :late, :late)"
        connection.execute(
            text(f"{job} updated_at, started_at) {values}"), {"spec": spec_json, "born": born, "late": born + 9_000_000}
        )
        for seq, (kind, after_us) in enumerate([("state_changed", 2_000_000), ("phase_changed", 5_000_000)], 1):
            event = "INSERT INTO events (job_id, seq, time, type, body) VALUES ('job_old', :seq, :time, :kind, '{}')"
            connection.execute(text(event), {"seq": seq, "time": born + after_us, "kind": kind})
        connection.execute(
            text("INSERT INTO idempotency_keys VALUES ('key', 'job_old', :sha, :born)"), {"sha": sha, "born": born}
        )
        connection.execute(
            text("INSERT INTO attempts VALUES ('job_old', 1, :sha, :born, NULL, NULL)"), {"sha": sha, "born": born}
        )


def test_a_database_of_before_keeps_its_jobs_and_gains_what_is_new(place: Place) -> None:
    remember_the_past(place)
    store = place.open()
    job = store.get("job_old")
    assert (job.owner, job.spec.priority, job.checkpoint_requests, job.stop_saves) == ("anonymous", 0, 0, False)
    assert (job.state, job.state_since) == (JobState.RUNNING, BORN + timedelta(seconds=2))
    assert [event.seq for event in store.events("job_old")] == [1, 2]
    assert place.run("SELECT owner, key, job_id FROM idempotency_keys") == [("anonymous", "key", "job_old")]
    assert store.transition(job, JobState.SUCCEEDED).version == 4
    assert store.attempt("job_old", 1).number == 1
    store.close()
    again = place.open()
    assert again.get("job_old").state is JobState.SUCCEEDED
    again.close()


def test_services_that_start_at_once_upgrade_once_and_all_work(place: Place) -> None:
    remember_the_past(place)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: place.open(), range(4)))
    for store in stores:
        store.create(spec())
        assert len(store.unfinished()) >= 2
        store.close()
    assert len(place.run("SELECT version_num FROM alembic_version")) == 1


def test_services_that_start_at_once_on_nothing_make_the_tables_once(place: Place) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: place.open(), range(4)))
    for store in stores:
        store.create(spec())
        store.close()
    assert place.run("SELECT count(*) FROM jobs") == [(4,)]
    assert len(place.run("SELECT version FROM schema_version")) == 1


@pytest.mark.parametrize(
    "written", ["alembic_version SET version_num = '9999_later'", "schema_version SET version = 99"]
)
def test_a_database_of_a_newer_service_is_refused_and_left_alone(place: Place, written: str) -> None:
    place.open().close()
    if "schema_version" in written:
        place.run("DROP TABLE alembic_version")
    place.run(f"UPDATE {written}")
    with place.engine.begin() as connection:
        before = tables(connection)
    with pytest.raises(StoreUnavailable, match=r"99.*a newer one has written it; .*SYNCBN_DATA"):
        place.open()
    with place.engine.begin() as connection:
        assert tables(connection) == before


def test_a_broken_upgrade_changes_nothing(place: Place) -> None:
    remember_the_past(place)
    place.run("CREATE TABLE leases (mine INTEGER)")  # in the way of a step
    with place.engine.begin() as connection:
        before = tables(connection)
    with pytest.raises(StoreUnavailable, match=r"(?s)from schema 0001_baseline to .*leases.*nothing was changed"):
        place.open()
    with place.engine.begin() as connection:
        assert tables(connection) == before
    place.run("DROP TABLE leases")
    store = place.open()
    assert store.get("job_old").state is JobState.RUNNING
    store.close()
