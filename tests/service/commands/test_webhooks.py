"""Webhooks from the command line, against the real API over a real socket and with a real receiver."""

import json
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.commands.program import app
from service.errors import InvalidRequest, NotFound
from service.jobs import Role
from service.store import JobStore
from tests.service.api.house import House
from tests.service.api.live import listening
from tests.service.webhooks.receiving import Receiver, receiving

SECRET = "ci@alice"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as opened:
        yield opened


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What alice has in her shell, of a service that keeps one secret of hers."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / SECRET).write_text("a-secret-of-these-tests")
    (folder / SECRET).chmod(0o600)
    store = JobStore.open(tmp_path / "jobs.sqlite")
    house = House(store, secrets=folder, networks=(ip_network("127.0.0.0/8"),))
    key = house.key("alice", Role.SUBMITTER)["Authorization"].removeprefix("Bearer ")
    with listening(house.app()) as url:
        yield {"SYNCBN_URL": url, "SYNCBN_API_TOKEN": key, "COLUMNS": "300"}
    store.close()


def webhooks(environment: dict[str, str], *arguments: str) -> Result:
    answer = CliRunner().invoke(app, ["webhooks", *arguments], env=environment)
    if answer.exception is not None and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer


def test_a_webhook_is_added_listed_tried_shown_and_removed(environment: dict[str, str], receiver: Receiver) -> None:
    url = f"http://127.0.0.1:{receiver.port}/ok"
    more = ("--event", "evaluation", "--event", "checkpoint")
    added = json.loads(webhooks(environment, "add", url, "--secret", SECRET, *more, "--json").output)
    assert (added["url"], added["events"]) == (url, ["state_changed", "evaluation", "checkpoint"])
    plain = webhooks(environment, "add", url, "--secret", SECRET).output
    assert f" tells {url} of state_changed; try it: syncbn webhooks test hook_" in plain
    hook = added["id"]
    lines = [json.loads(line) for line in webhooks(environment, "list", "--json").output.splitlines()]
    assert lines[0] == added
    assert len(lines) == 2
    assert (
        f"{hook}  alice  active  {url}  state_changed, evaluation, checkpoint" in webhooks(environment, "list").output
    )
    tried = webhooks(environment, "test", hook)
    assert (tried.exit_code, tried.output.startswith(f"{hook} answered 200, in ")) == (0, True)
    assert receiver.posts[0].headers["Syncbn-Event"] == "test"
    receiver.fails = {"/ok"}
    failed = webhooks(environment, "test", hook, "--json")
    assert (failed.exit_code, json.loads(failed.output)["error"]) == (1, "answered 500")
    shown = webhooks(environment, "show", hook).output
    for part in (f"{hook} of alice is active: {url}, signed with {SECRET}", "answered 200", "failed: answered 500"):
        assert part in shown
    machine = [json.loads(line) for line in webhooks(environment, "show", hook, "--json").output.splitlines()]
    assert machine[0] == added
    assert [one["status"] for one in machine[1:]] == [500, 200]
    assert webhooks(environment, "remove", hook).exit_code == 0
    with pytest.raises(NotFound):
        webhooks(environment, "show", hook)


def test_an_order_that_is_wrong_is_told_by_its_fields(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as here:
        webhooks(environment, "add", "ftp://x", "--secret", "no such name!")
    assert {problem.pointer for problem in here.value.problems} == {"/url", "/secret"}
    with pytest.raises(InvalidRequest) as there:
        webhooks(environment, "add", "https://127.0.0.1:1/x", "--secret", "ci@bob")
    assert [problem.pointer for problem in there.value.problems] == ["/secret"]
