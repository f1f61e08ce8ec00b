"""Everything that the service writes, searched for every secret that it was shown."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.client import Client
from service.jobs import NewApiKey
from service.settings import ClientSettings, Settings
from service.store.schema import metadata

ROOT = Path(__file__).parents[2]

# In a process of its own, because it sends the log of the whole process to stderr.
_PROGRAM = """
import json, sys
from pathlib import Path
from ipaddress import ip_network
from service.api.rates import RateLimits
from service.jobs import Role
from service.log import configure_log
from service.store import JobStore
from tests.service.api.house import House

configure_log(as_json=sys.argv[2] == "json")
house = House(JobStore.open(Path(sys.argv[1]) / "jobs.sqlite"), limits=RateLimits(refusals="2/year"))
house.secrets, house.networks = Path(sys.argv[3]), (ip_network("127.0.0.0/8"),)
signing = "5ecre7-of-the-webhooks"
for name, text in (("good", signing), ("open", signing), ("short", signing[:12])):
    (house.secrets / name).write_text(text)
    (house.secrets / name).chmod(0o644 if name == "open" else 0o600)
operator = "operator-token-4f1d"
job, ingest = house.running_job()
wrong = "syncbn_" + "0b" * 32
secrets, answers = [operator, ingest, wrong], []

def ask(method, path, secret, **request):
    answer = client.request(method, path, headers={"Authorization": f"Bearer {secret}"}, **request)
    answers.append([method, path.replace(secret, "SECRET"), answer.status_code, answer.text])
    return answer

with house.client(api_token=operator) as client:
    ask("PUT", "/v1/principals/alice", operator, json={"role": "submitter"})
    for path in ("/v1/api-keys", "/v1/api-keys/{}:rotate"):
        made = ask("POST", path.format(house.store.keys.page()[0].id if "{" in path else ""), operator,
                   **({} if "{" in path else {"json": {"principal": "alice"}}))
        secrets.append(made.json()["key"])
        answers.pop()  # the one answer that tells it
    key = secrets[-1]
    ask("POST", "/v1/jobs", key, json={"name": "digits", "epochs": 1})
    ask("POST", "/v1/jobs", key, json={"name": "", "epochs": 0})
    for name in ("good", "open", "short", "none", signing, signing + "!"):
        hook = {"url": "http://127.0.0.1:9/", "events": ["*"], "secret": name}
        path = ask("POST", "/v1/webhooks", operator, json=hook).headers.get("Location", "/v1/webhooks/none")
        ask("POST", f"{path}:test", operator)
        ask("GET", f"{path}/deliveries", operator)
    ask("POST", f"/v1/attempts/{job.id}-1/telemetry", ingest, json={"batches": []})
    ask("POST", f"/v1/attempts/{job.id}-1/telemetry", ingest, json={"batches": 3})
    for path in ("/v1/whoami", "/v1/api-keys", "/v1/audit", "/v1/jobs", "/metrics", "/openapi.json"):
        ask("GET", path, operator)
    ask("DELETE", "/v1/nowhere?key=" + operator, operator)
    house.max_workers = "few"
    ask("POST", "/v1/jobs", key, json={"name": "breaks", "epochs": 1})
    house.max_workers = 4
    for secret in (wrong, secrets[3], ingest, ingest):
        ask("POST", "/v1/jobs", secret, json={"name": "digits", "epochs": 1})
    with house.store._database.write() as connection:
        connection.exec_driver_sql("DROP TABLE audit")
    ask("POST", "/v1/jobs", key, json={"name": "unrecorded", "epochs": 1})
secrets.append(signing)
print(json.dumps({"secrets": secrets, "answers": answers}))
"""


@pytest.mark.parametrize("log", ["json", "text"])
def test_no_secret_is_written_to_log_database_or_any_answer_but_one(tmp_path: Path, log: str) -> None:
    written_to, kept_in = tmp_path / "written", tmp_path / "secrets"
    written_to.mkdir()
    kept_in.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(written_to), log, str(kept_in)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    statuses = {status for _, _, status, _ in told["answers"]}
    assert statuses >= {200, 201, 401, 404, 422, 429, 500, 503}  # every way out has been taken
    assert "ZeroDivision" in ran.stderr or "TypeError" in ran.stderr
    assert "not on record" in ran.stderr
    files = {path.name: path.read_bytes() for path in written_to.iterdir()}
    assert b"principals" in files["jobs.sqlite"]
    written = {"log": ran.stderr.encode(), "answers": json.dumps(told["answers"]).encode(), **files}
    assert len(set(told["secrets"])) == 6
    for secret in told["secrets"]:
        bare = secret.removeprefix("syncbn_").encode()
        assert [name for name, text in written.items() if bare in text] == []


def test_no_secret_shows_in_what_holds_it() -> None:
    secret = "a-secret-of-this-test"
    url = f"postgresql://user:{secret}@host/database"
    fields = {"api_token": secret, "ray_token": secret, "database_url": url}
    with Client(token=secret) as client:
        holders = [Settings.model_validate(fields), ClientSettings.model_validate({"api_token": secret}), client]
        holders.append(NewApiKey.model_validate({"id": "k", "principal": "p", "created_at": 0, "key": secret}))
        for holder in holders:
            assert secret not in f"{holder!r} {holder}"


def test_of_every_secret_the_schema_keeps_a_digest() -> None:
    columns = {f"{table.name}.{column.name}" for table in metadata.tables.values() for column in table.columns}
    secret = {name for name in columns if any(word in name for word in ("token", "secret", "password", "sha256"))}
    assert secret == {
        "attempts.token_sha256",
        "api_keys.sha256",
        "idempotency_keys.spec_sha256",
        "webhooks.secret_name",  # the name of a file that the service's operator keeps
        "leases.token",  # counts the lease's holders; it opens nothing
    }
