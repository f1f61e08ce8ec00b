from pathlib import Path

import pytest
from pydantic import HttpUrl, SecretStr

from service.composition import serve
from service.memory import NoSharedCluster, open_store, refuse_unshared_cluster
from service.settings import Settings
from tests.postgresql import PostgresServer
from tests.service.store.telling import spec

RAY = HttpUrl("http://head:8265")


def test_services_with_one_database_url_remember_the_same_jobs(tmp_path: Path, postgresql: PostgresServer) -> None:
    url = postgresql.url(postgresql.new_database())
    first, second = (open_store(Settings(data_dir=tmp_path / name, database_url=url)) for name in ("a", "b"))
    job, _ = first.create(spec())
    assert second.get(job.id) == job
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_database_url_the_file_in_the_data_folder_is_opened(tmp_path: Path) -> None:
    open_store(Settings(data_dir=tmp_path)).close()
    assert (tmp_path / "syncbn.sqlite").is_file()


def test_a_shared_database_with_a_local_head_is_refused_before_anything_starts(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url=SecretStr("postgresql://127.0.0.1:1/jobs"))
    with pytest.raises(NoSharedCluster, match="SYNCBN_RAY_ADDRESS"):
        serve(settings)
    refuse_unshared_cluster(settings.model_copy(update={"ray_address": RAY}))
    refuse_unshared_cluster(settings.model_copy(update={"database_url": None}))


def test_the_settings_never_show_the_password_of_the_database() -> None:
    settings = Settings(database_url=SecretStr("postgresql://anna:hunter2@127.0.0.1/jobs"))
    assert settings.database_url is not None
    assert "hunter2" in settings.database_url.get_secret_value()
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
