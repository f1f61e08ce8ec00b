"""The demonstration: the same network trained twice on real images, synchronized and not, through the whole service.

Two workers with two images each: normalized over its own two images a worker's statistics are noise, over all
four together they carry. Everything is real: the service in its own process, REST, Ray, two ranks, the store.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from service import display
from service.client import Client
from service.errors import ServiceError
from service.jobs import JobReport, JobSpec, JobState, Normalization, Sgd

DATA_DIR = Path(".demo")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DIGITS_EPOCHS = 15
_FASHION_STEPS = 5400
_STOP_TIMEOUT_S = 60.0


def main() -> int:
    """Run the demonstration; exit status 0 when both jobs succeeded."""
    parser = argparse.ArgumentParser(prog="python -m service.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--once", action="store_true", help="exit after the table instead of keeping the service up")
    parser.add_argument(
        "--data", help="builtin:digits, builtin:fashion-mnist or idx:/FOLDER; by default the best found"
    )
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="the service's data folder")
    parser.add_argument("--port", type=int, default=0, help="the service's port; by default any free one")
    arguments = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the service is stopped then too
    try:
        with _service(arguments.data_dir, arguments.port) as url, Client(url) as client:
            console.print(f"service on {url}, log in {arguments.data_dir / 'service.log'}")
            reports = [_train(console, client, spec) for spec in demo_specs(arguments.data)]
            console.print(display.comparison_table(reports, [str(report.normalization) for report in reports]))
            for report in reports:
                console.print(f"[bold]{report.normalization}[/]: {report.drift.sentence}")
            if not arguments.once:
                console.print(f"\nThe service stays up at [bold]{url}[/]; Ctrl-C ends it. Try, in another terminal:")
                console.print(f"  SYNCBN_URL={url} .venv/bin/syncbn show --report {reports[0].job_id}")
                signal.pause()
            return 0 if all(report.state is JobState.SUCCEEDED for report in reports) else 1
    except ServiceError as error:
        display.print_error(console, error)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 0


def demo_specs(uri: str | None = None) -> list[JobSpec]:
    """The two jobs: equal but for the normalization. Fashion-MNIST where it is installed, else digits."""
    found = "builtin:fashion-mnist" if FASHION_MNIST.is_dir() else "builtin:digits"
    images = uri or found
    length = {"epochs": _DIGITS_EPOCHS} if images == "builtin:digits" else {"max_steps": _FASHION_STEPS}
    return [
        JobSpec(
            name=f"demo {normalization}",
            data=images,
            normalization=normalization,
            num_workers=2,
            batch_size_per_worker=2,
            optimizer=Sgd(learning_rate=0.01, momentum=0.9),
            **length,
        )
        for normalization in (Normalization.SYNC, Normalization.LOCAL)
    ]


def _train(console: Console, client: Client, spec: JobSpec) -> JobReport:
    job = client.submit(spec)
    console.print(f"\n[bold]{spec.name}[/]: POST /v1/jobs -> {job.id}")
    display.watch(console, client, job.id)
    return client.report(job.id)


@contextmanager
def _service(data_dir: Path, port: int) -> Iterator[str]:
    """Run the service in a process of its own, and its URL; it is stopped as Ctrl-C would."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "service", "serve", "--json", "--data-dir", str(data_dir), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_")}
    with (data_dir / "service.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=environment
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ServiceError(f"the service did not start; the reason is at the end of {log.name}")
            yield json.loads(line)["url"]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(_STOP_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
