"""What is left when the service's part that remembers and decides was killed, and what becomes of it."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from service.store import JobStore
from tests.faults.crashing import JOURNAL
from tests.faults.databases import Databases
from tests.faults.history import all_events, path_of, problems_of
from tests.faults.journal_cluster import JournalCluster
from tests.faults.story import ENDS, NUM_STEPS, Story, loss_of

_DEADLINE_S = 300


def crashes(folder: Path, every: int, *url: str) -> Iterator[tuple[Path, str]]:
    """The folder of each killed process, and what it was about to do; on the PostgreSQL server at ``url``, if given."""
    command = [sys.executable, "-m", "tests.faults.crashing", str(folder), str(every), *url]
    with (
        (folder / "said").open("w") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as teller,
    ):
        try:
            assert teller.stdout is not None
            for line in teller.stdout:
                where, _, killed_before = line.rstrip("\n").partition(" ")
                yield Path(where), killed_before
            assert teller.wait(_DEADLINE_S) == 0, (folder / "said").read_text()
        finally:
            teller.kill()


def what_went_wrong(folder: Path, databases: Databases) -> list[str]:
    """Each promise that is broken in what a killed process left, or by the one that goes on from there."""
    store, cluster = databases.open(folder), JournalCluster(folder / JOURNAL)
    try:
        story = Story(store, cluster, folder)
        problems = [*_broken_histories(store), *_forgotten_answers(store, story)]
        story.tell()
        return [*problems, *_broken_histories(store), *_launches_beside_others(cluster), *_wrong_ends(store)]
    finally:
        store.close()


def _broken_histories(store: JobStore) -> list[str]:
    return [problem for job in store.list_jobs(limit=100).items for problem in problems_of(store, job.id)]


def _forgotten_answers(store: JobStore, story: Story) -> list[str]:
    paths = {job.id: path_of(all_events(store, job.id)) for job in store.list_jobs(limit=100).items}
    return [
        f"{job_id}: {state} was answered" for state, job_id in story.answered() if state not in paths.get(job_id, [])
    ]


def _launches_beside_others(cluster: JournalCluster) -> list[str]:
    """Attempts that were started twice, or while another of the same job had not left."""
    problems: list[str] = []
    alive: set[str] = set()
    counted: Counter[str] = Counter()
    for entry in cluster.entries():
        if entry.what == "launch":
            counted[entry.attempt] += 1
            job_id = entry.attempt.rpartition("-")[0]
            problems += [f"{entry.attempt} beside {each}" for each in alive if each.startswith(job_id)]
            alive.add(entry.attempt)
        elif entry.what != "again":
            alive.remove(entry.attempt)
    return problems + [f"{attempt} {times} times" for attempt, times in counted.items() if times > 1]


def _wrong_ends(store: JobStore) -> list[str]:
    jobs = {job.spec.name: job for job in store.list_jobs(limit=100).items}
    ends = {name: job.state for name, job in jobs.items()}
    problems = [] if ends == ENDS else [f"the jobs came to {ends}"]
    for name, rank, last_step in (("steered", 0, NUM_STEPS), ("steered", 1, 3), ("unlucky", 0, NUM_STEPS)):
        steps = list(range(1, last_step + 1))
        series = store.metric(jobs[name].id, "train/loss", rank=rank)
        if (list(series.steps), list(series.values)) != (steps, [loss_of(rank, number) for number in steps]):
            problems.append(f"rank {rank} of {name} has the points {series.steps} {series.values}")
    for name in ("steered", "unlucky"):
        told = Counter((line.attempt, line.rank, line.text) for line in store.logs(jobs[name].id))
        problems += [f"{name} has the line {which} {count} times" for which, count in told.items() if count != 1]
    lost = jobs["unlucky"].id
    if not any(line.text == f"last lines of {lost}-1" for line in store.logs(lost)):
        problems.append("what the lost runner wrote last was not kept")
    return problems
