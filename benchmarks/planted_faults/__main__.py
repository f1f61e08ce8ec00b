"""``python -m benchmarks.planted_faults``: plant faults in real runs, and count what the reports find.

What the runs tell is kept in a folder, so that work that was interrupted goes on, and that verdicts can be judged anew
without training. Thresholds were chosen on seeds 0-19; only other seeds measure anything. With ``--service`` each run
is a job of a real service, which makes the page that is judged: it shows that nothing is lost on a job's way.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.planted_faults.jobs import has_way, path_of_shown, read_shown, run_jobs, write_shown
from benchmarks.planted_faults.page import Shown, shown
from benchmarks.planted_faults.runs import path_of, read, run, write
from benchmarks.planted_faults.scenarios import ALL_HEALTHY, SCENARIOS
from benchmarks.planted_faults.scoring import row, score, table
from benchmarks.record import record


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, judge all there is of the seeds asked for."""
    options = _parser().parse_args(arguments)
    keys = [key for key in SCENARIOS if not options.scenarios or key in options.scenarios]
    without_way = [key for key in keys if options.service and not has_way(SCENARIOS[key])]
    keys = [key for key in keys if key not in without_way]
    pairs = [(key, seed) for seed in _seeds(options.seeds) for key in keys]
    trials = [(key, seed) for key, seed in pairs if options.service or SCENARIOS[key].seeds(seed)]
    folder: Path = options.folder
    kept = path_of_shown if options.service else path_of
    missing = [(key, seed) for key, seed in trials if not kept(folder, key, seed).exists()]
    for new in [] if options.judge else (_by_service if options.service else _by_plain_ranks)(missing, folder):
        print(new.scenario.key, score(new), *new.failures[:1], flush=True)
    there = [(key, seed) for key, seed in trials if kept(folder, key, seed).exists()]
    judged = [read_shown(folder, *one) if options.service else shown(read(folder, *one)) for one in there]
    runs = {key: [one for one in judged if one.scenario.key == key] for key in keys}
    rows = [row(SCENARIOS[key], of_key) for key, of_key in runs.items() if of_key]
    if healthy := [one for one in judged if one.scenario.number == ALL_HEALTHY.number]:
        rows.insert(0, row(ALL_HEALTHY, healthy))
    print(table(rows))
    for key in without_way:
        print(f"| {key} | {SCENARIOS[key].says} | | no job tells of what is looked at after a run | | | |")
    if options.record:
        figures = {one.scenario: one.as_dict() for one in rows}
        suffix = "_service" if options.service else ""
        record("planted_faults", figures, suffix, seeds=options.seeds, no_job_tells_of=without_way)


def _by_plain_ranks(trials: Sequence[tuple[str, int]], folder: Path) -> Iterator[Shown]:
    for told in run(trials):
        write(told, folder)
        yield shown(told)


def _by_service(trials: Sequence[tuple[str, int]], folder: Path) -> Iterator[Shown]:
    for new in run_jobs(trials):
        write_shown(new, folder)
        yield new


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted_faults", description=__doc__)
    parser.add_argument("--seeds", default="0-19", help="such as 100-149 or 3")
    parser.add_argument("--scenarios", nargs="*", help=f"any of {', '.join(map(repr, SCENARIOS))}; default all")
    parser.add_argument("--folder", type=Path, default=Path(".planted_faults"), help="where runs are kept")
    parser.add_argument("--judge", action="store_true", help="judge what there is, train nothing")
    parser.add_argument("--service", action="store_true", help="run jobs of a real service instead of plain ranks")
    parser.add_argument("--record", action="store_true", help="write results/planted_faults[_service].json")
    return parser


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    main()
