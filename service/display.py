"""What the command line shows to people: tables, panels and the live progress bar."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

from service.client import Client
from service.errors import InvalidRequest, ServiceError
from service.jobs import ANONYMOUS, DriftColour, Job, JobFinding, JobReport, LogRecord, PlannedJob, Severity
from service.jobs import Progress as JobProgress

if TYPE_CHECKING:
    from service.doctor import Finding

_COLOUR = {
    DriftColour.GREEN: "green",
    DriftColour.AMBER: "yellow",
    DriftColour.RED: "red",
    DriftColour.UNDECIDED: "dim",
}
_SEVERITY = {Severity.RED: "red", Severity.AMBER: "yellow", Severity.NOTE: "dim"}


def print_error(console: Console, error: ServiceError) -> None:
    """One line for an error, or one for each wrong field."""
    if isinstance(error, InvalidRequest):
        for problem in error.problems:
            where = f"[bold]{escape(problem.pointer)}[/]: " if problem.pointer else ""
            console.print(f"[red]error:[/] {where}{escape(problem.message)}", soft_wrap=True, highlight=False)
    else:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def job_table(jobs: Iterable[Job]) -> Table:
    """One line for each job."""
    jobs = list(jobs)
    owners = any(job.owner != ANONYMOUS for job in jobs)
    job_id = Column("job", no_wrap=True)  # is copied into the next command, so it is never cut
    table = Table(
        job_id, *(["owner"] if owners else []), "name", "state", "step", "loss", "accuracy", "created", box=None
    )
    for job in jobs:
        progress = job.progress
        table.add_row(
            job.id,
            *([job.owner] if owners else []),
            job.spec.name,
            _standing(job),
            f"{progress.step}/{progress.total_steps}" if progress else "",
            _number(progress.train_loss if progress else None),
            _percent(progress.validation_accuracy if progress else None),
            f"{job.created_at:%m-%d %H:%M}",
        )
    return table


def job_panel(job: Job) -> RenderableType:
    """Everything about one job that is not its report."""
    rows: list[tuple[str, str]] = [
        ("owner", job.owner if job.owner != ANONYMOUS else ""),
        ("state", _standing(job) + (" (stale)" if job.stale else "")),
        ("why", f"{job.reason}: {job.detail}" if job.reason else job.detail),
        ("starts after", ", ".join(job.spec.after)),
        ("takes up", job.retry_of or ""),
        ("begins from", escape(job.start_checkpoint or "")),
        ("model", f"{job.spec.model.name} on {job.spec.data}"),
        ("normalization", f"{job.spec.normalization} over {job.spec.normalization_batch_size} images"),
        ("workers", f"{job.spec.num_workers} with {job.spec.batch_size_per_worker} images each"),
        ("attempt", str(job.attempt)),
    ]
    if job.heartbeat_age_s is not None and not job.state.terminal:
        rows.append(("last heard", f"{job.heartbeat_age_s:.1f} s ago"))
    if job.progress is not None:
        rows.append(("progress", _progress_line(job.progress)))
    return Panel(_rows(rows), title=f"{job.id}  {escape(job.spec.name)}", title_align="left")


def plan_panel(planned: PlannedJob) -> RenderableType:
    """What a job would be: batches, steps, exchanges, and the layers whose statistics rest on the fewest values."""
    plan = planned.plan
    rows = [
        ("batch", f"{plan.global_batch_size} images a step; {plan.normalization_batch_size} share one batch statistic"),
        ("steps", f"{plan.total_steps}, {plan.steps_per_epoch} an epoch of {plan.num_train_images} images"),
        ("parameters", f"{plan.num_parameters}, {_bytes(plan.gradient_bytes_per_step)} of gradients a step and worker"),
        (
            "BatchNorm",
            f"{len(plan.layers)} layers, {plan.exchanges_per_step} exchanges and "
            f"{_bytes(plan.exchange_bytes_per_step)} a step and worker",
        ),
    ]
    if plan.layers:
        least = min(plan.layers, key=lambda layer: layer.num_values)
        rows.append(("fewest values", f"{least.num_values} a channel, in layer {escape(least.layer)}"))
        noisiest = max(plan.layers, key=lambda layer: layer.running_mean_noise)
        rows.append(
            (
                "running means",
                f"off by about {noisiest.running_mean_noise:.2g} sigma by chance in layer {escape(noisiest.layer)}, "
                f"at most {noisiest.worst_noise:.2g}; {plan.lag_steps:g} steps behind; {plan.initial_weight:.1%} "
                "of their start left",
            )
        )
    rows += [("warning", f"[yellow]{escape(warning.message)}[/]") for warning in plan.warnings]
    rows += [("cluster", f"[red]{escape(problem.message)}[/]") for problem in planned.placement]
    if planned.feasible:
        rows.append(("cluster", "could hold it"))
    return Panel(_rows(rows), title="plan", title_align="left")


def report_panel(report: JobReport) -> RenderableType:
    """The report as text: the three numbers with their colours, what was found, what to change, then the rest."""
    first = {report.drift.sentence, report.stale.sentence, report.ranks.sentence, report.convergence.sentence}
    found = [finding for finding in report.findings if finding.sentence not in first]
    told = {finding.sentence for finding in found}
    rows = [
        ("damage", _coloured(report.drift.colour, report.drift.sentence)),
        ("stale", _coloured(report.stale.colour, report.stale.sentence)),
        ("ranks", _coloured(report.ranks.colour, report.ranks.sentence)),
        ("convergence", escape(report.convergence.sentence)),
        *((f"found ({finding.severity})", _found(finding)) for finding in found),
        *((f"to do {number}", escape(advice)) for number, advice in enumerate(report.advice, start=1)),
        *((name, escape(sentence)) for name, sentence in _other_verdicts(report) if sentence not in told),
        *_scores(report),
        ("steps", f"{report.num_steps} in {_duration(report.training_s)}, {report.num_attempts} attempt(s)"),
    ]
    state = f"{report.state}" + ("" if report.complete else ", not complete yet")
    return Panel(_rows(rows), title=f"{report.job_id}  {escape(report.name)}  ({state})", title_align="left")


def comparison_table(reports: Sequence[JobReport], titles: Sequence[str]) -> Table:
    """Several reports side by side, one column each."""
    table = Table("", *titles, title="the same network, data and seed", title_justify="left")
    columns = [_compared(report) for report in reports]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def findings_table(findings: Sequence["Finding"]) -> Table:
    """What the doctor found."""
    table = Table("", "check", "found", "remedy", box=None)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]!![/]"
        table.add_row(mark, escape(finding.check), escape(finding.found), escape(finding.remedy))
    return table


def log_line(record: LogRecord) -> str:
    """One log record as one line."""
    who = f"rank {record.rank}" if record.rank >= 0 else "runner"
    return f"{record.time:%H:%M:%S} attempt {record.attempt} {who:>7} {record.level:7} {record.text}"


def watch(console: Console, client: Client, job_id: str) -> None:
    """Follow a job with a progress bar until it ends; what happens to it is printed above the bar."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        console=console,
    )  # fmt: skip
    job = client.job(job_id)
    with bar:
        task = bar.add_task(job.spec.name, total=None, text=str(job.state))
        for kind, payload in client.stream(job_id):
            if kind == "progress":
                _show_progress(bar, task, JobProgress.model_validate(payload))
            elif (line := _event_line(kind, payload)) is not None:
                bar.console.print(line, highlight=False)


def _standing(job: Job) -> str:
    """The state, with phase, place in the queue, and priority where that is not the usual one."""
    place = f"place {job.queue_position}" if job.queue_position is not None else ""
    priority = f"priority {job.spec.priority}" if job.spec.priority and not job.state.terminal else ""
    more = ", ".join(filter(None, (job.phase, place, priority)))
    return f"{job.state} ({more})" if more else str(job.state)


def _compared(report: JobReport) -> dict[str, str]:
    last, worst = report.last_evaluation, report.drift.worst_layer
    return {
        "accuracy, stored statistics": _percent(last.stored.accuracy if last else None),
        "accuracy, population statistics": _percent(last.population.accuracy if last else None),
        "loss, stored statistics": _number(last.stored.loss if last else None),
        "loss, population statistics": _number(last.population.loss if last else None),
        "worst layer's drift (sigma)": _number(worst.rms_mean_shift if worst else None),
        "rank disagreement (sigma)": _number(report.drift.max_rank_disagreement),
        "steps": str(report.num_steps),
        "seconds of training": _number(report.training_s),
        "the training loss is": str(report.convergence.verdict),
        "the running statistics are": f"[{_COLOUR[report.drift.colour]}]{report.drift.colour}[/]",
    }


def _coloured(colour: DriftColour, sentence: str) -> str:
    return f"[bold {_COLOUR[colour]}]{colour}[/]: {escape(sentence.removeprefix('Undecided: '))}"


def _other_verdicts(report: JobReport) -> Iterator[tuple[str, str]]:
    if report.evaluations:
        yield "overfitting", report.overfitting.sentence
    if report.target is not None:
        yield "target", report.target.sentence
    if report.decay.law is not None:
        yield "law of the loss", report.decay.sentence
    if report.momentum is not None:
        yield "momentum", report.momentum.sentence
    if report.checkpoint is not None:
        yield "checkpoint", report.checkpoint.sentence


def _found(finding: JobFinding) -> str:
    return f"[{_SEVERITY[finding.severity]}]{escape(finding.sentence)}[/]"


def _scores(report: JobReport) -> list[tuple[str, str]]:
    last = report.last_evaluation
    if last is None:
        return []
    statistics = {"stored statistics": last.stored, "population statistics": last.population}
    return [
        (name, f"accuracy {_percent(scores.accuracy)}, loss {_number(scores.loss)}")
        for name, scores in statistics.items()
    ]


def _show_progress(bar: Progress, task: TaskID, progress: JobProgress) -> None:
    bar.update(task, completed=progress.step, total=progress.total_steps, text=_progress_line(progress))


def _progress_line(progress: JobProgress) -> str:
    parts = [f"loss {_number(progress.train_loss)}"]
    if progress.validation_accuracy is not None:
        parts.append(f"accuracy {_percent(progress.validation_accuracy)}")
    if progress.worst_layer_drift is not None:
        parts.append(f"drift {_number(progress.worst_layer_drift)}")
    if progress.remaining_s is not None and progress.step < progress.total_steps:
        parts.append(f"{_duration(progress.remaining_s)} left")
    return "  ".join(parts)


def _event_line(kind: str, payload: Mapping[str, Any]) -> str | None:
    body = payload.get("body", {})
    if kind == "state_changed":
        why = f" ({body['reason']}: {escape(str(body.get('detail', '')))})" if body.get("reason") else ""
        before = f"{body['from']} -> " if body.get("from") else ""
        return f"  [dim]{before}[/][bold]{body.get('to')}[/]{why}"
    if kind == "rank_started" and body.get("resumed_step"):
        return f"  [dim]rank {payload.get('rank')} goes on from step {body['resumed_step']}[/]"
    return None


def _rows(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:
            table.add_row(f"[dim]{name}[/]", value)
    return table


def _bytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.1f} s"
