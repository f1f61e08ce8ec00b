"""``python -m benchmarks.planted_faults``: plant faults in real runs, and count what the reports find.

What the runs tell is kept in a folder, so that work that was interrupted goes on, and that verdicts can be judged anew
without training. Thresholds were chosen on seeds 0-19; only other seeds measure anything.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.planted_faults.runs import path_of, read, run, write
from benchmarks.planted_faults.scenarios import SCENARIOS
from benchmarks.planted_faults.scoring import row, score, table
from benchmarks.record import record


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, judge all there is of the seeds asked for."""
    options = _parser().parse_args(arguments)
    keys = [key for key in SCENARIOS if not options.scenarios or key in options.scenarios]
    seeds = _seeds(options.seeds)
    folder: Path = options.folder
    missing = [(key, seed) for seed in seeds for key in keys if not path_of(folder, key, seed).exists()]
    for told in [] if options.judge else run(missing):
        write(told, folder)
        print(told.scenario.key, score(told), flush=True)
    rows = []
    for key in keys:
        finished = [read(folder, key, seed) for seed in seeds if path_of(folder, key, seed).exists()]
        if finished:
            rows.append(row(SCENARIOS[key], finished))
    print(table(rows))
    if options.record:
        record("planted_faults", {one.scenario: one.as_dict() for one in rows}, seeds=options.seeds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted_faults", description=__doc__)
    parser.add_argument("--seeds", default="0-19", help="such as 100-149 or 3")
    parser.add_argument("--scenarios", nargs="*", help=f"any of {', '.join(map(repr, SCENARIOS))}; default all")
    parser.add_argument("--folder", type=Path, default=Path(".planted_faults"), help="where runs are kept")
    parser.add_argument("--judge", action="store_true", help="judge what there is, train nothing")
    parser.add_argument("--record", action="store_true", help="write results/planted_faults.json")
    return parser


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    main()
