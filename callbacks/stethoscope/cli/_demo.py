"""`stethoscope demo`: a real training on made-up audio, observed."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from stethoscope import Monitor
    from stethoscope.cli._demo_audio import Batch
    from stethoscope.cli._demo_faults import Training

_VALIDATIONS = 8
_BATCH, _SECONDS = 4, 1.0


class _Stop(Exception):  # noqa: N818  # not an error: the way to end the training from on_finding
    """Raised on the first finding of severity error in the loop."""


def demo(
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps. 500 take about a minute on two cores.")] = 500,
    every: Annotated[int, typer.Option(min=1, help="Observe each of so many steps.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the audio and of the weights.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the run. If it holds something, OUT-2, OUT-3 ... is taken.")
    ] = Path("runs/demo"),
    fault: Annotated[
        str,
        typer.Option(help="Plant a real mistake and see it found: nan, causal, metric, sparsity, collapse, plateau."),
    ] = "",
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Write a W&B run as well, offline, into the same folder.")
    ] = False,
) -> None:
    """Train a small speech separation network on made-up audio for a minute, and see inside it.

    Exit code 0: nothing found, 1: findings of warning or error.
    """
    from rich.console import Console

    from stethoscope import Monitor, audits, presets, sinks
    from stethoscope.cli._demo_audio import SAMPLE_RATE
    from stethoscope.cli._demo_faults import FAULTS, METRICS
    from stethoscope.cli._layers import Layers
    from stethoscope.watches import Field, MetricSchema

    if fault and fault not in FAULTS:
        raise typer.BadParameter(f"Unknown fault {fault!r}. Known: {sorted(FAULTS)}.", param_hint="--fault")
    if wandb and find_spec("wandb") is None:
        raise typer.BadParameter('W&B is not installed: pip install "stethoscope[wandb]".', param_hint="--wandb")

    console = Console(highlight=False)
    folder = _fresh(out)
    training, validation = _prepare(steps, seed)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    console.print(f"[bold]stethoscope demo[/]: two talkers, {parameters:,} parameters, {steps} steps, seed {seed}")
    if fault:
        console.print(f"[yellow]planted fault[/] {fault}: {FAULTS[fault].mistake}")
        FAULTS[fault].plant(training)

    layers = Layers()
    outputs: list[Any] = [sinks.Jsonl(folder), sinks.Console(), layers]
    tensorboard = find_spec("tensorboard") is not None
    if tensorboard:
        outputs.append(sinks.TensorBoard(folder, max_series=None))
    with _wandb_run(folder, {"steps": steps, "seed": seed, "fault": fault}, wanted=wandb) as run:
        outputs += [run] if run is not None else []
        preset = presets.separation()
        agreed = MetricSchema({name: Field(float, unit="dB", phases=("val",)) for name in METRICS})
        monitor = Monitor(
            training.model,
            training.optimizer,
            probes=preset["probes"],
            watches=[*preset["watches"], agreed],
            sinks=outputs,
            every=every,
            planned_steps=steps,
            on_finding=_stop,
        )
        gains: list[float] = []
        try:
            with _findings_once(), monitor:
                example, promised = validation.mixture[:2, : SAMPLE_RATE // 2], training.model.lookahead
                monitor.add(
                    audits.causality(
                        training.model, example, allowed=promised, modes=("eval",), sample_rate=SAMPLE_RATE
                    )
                )
                for audit in training.before:
                    monitor.add(audit())
                _train(training, validation, monitor, console, gains)
                for audit in training.after:
                    monitor.add(audit())
        except _Stop:
            console.print("The demo stops here: after an error, the rest of the training tells nothing new.")

    if gains:  # the training has begun
        console.print(layers.table())
        console.print(
            f"SI-SDR improvement on held-out mixtures: {gains[0]:.1f} dB untrained, {gains[-1]:.1f} dB at the end"
        )
    _say_where_to_look(console, folder, tensorboard=tensorboard, wandb=wandb)
    serious = [finding for finding in monitor.findings if finding.severity != "info"]
    if serious:
        first = serious[0]
        again = f"stethoscope demo --steps {steps} --every {every} --seed {seed}{f' --fault {fault}' if fault else ''}"
        where = f" in {first.module}" if first.module else ""
        when = "before the training" if first.step is None else f"at step {first.step}"
        console.print(f"[bold red]Found[/] {first.code}{where} {when}. To see it again:", soft_wrap=True)
        console.print(f"  {again}", soft_wrap=True, markup=False)
        raise typer.Exit(1)


def _prepare(steps: int, seed: int) -> tuple[Training, Batch]:
    """Make the training and the batch that it is validated on."""
    import torch

    from stethoscope.cli._demo_audio import Talkers
    from stethoscope.cli._demo_faults import Training
    from stethoscope.cli._demo_model import Separator, pit_loss

    # layers this small gain nothing from a second thread, and lose minutes to it on a machine that is busy
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    talkers = Talkers.record(48, 3.0, generator)
    validation = Talkers.record(8, 3.0, generator).mix(16, _SECONDS, generator)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = Separator()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return Training(model, optimizer, lambda _: talkers.mix(_BATCH, _SECONDS, generator), pit_loss, steps), validation


def _train(training: Training, validation: Batch, monitor: Monitor, console: Console, gains: list[float]) -> None:
    """Train; `gains` gets each validation's SI-SDR improvement in dB."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from torch.nn.utils import clip_grad_norm_

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[reached]}"),
        TimeElapsedColumn(),
    )
    gains.append(_validate(training, validation, monitor))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training.steps, reached="")
        for step in range(training.steps):
            mixture, sources = training.batch(step)
            estimates = training.model(mixture)
            loss = training.loss(estimates, sources)
            training.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            clip_grad_norm_(training.model.parameters(), 5.0)
            training.optimizer.step()
            training.sparsify(step + 1)
            monitor.step(loss=loss, estimates=estimates, references=sources, mixture=mixture)
            if (step + 1) * _VALIDATIONS // training.steps > step * _VALIDATIONS // training.steps:
                gains.append(_validate(training, validation, monitor))
            reached = f"loss {loss.item():5.1f} dB  SI-SDRi {gains[-1]:+5.1f} dB"
            progress.update(task, advance=1, reached=reached)


def _validate(training: Training, batch: Batch, monitor: Monitor) -> float:
    """Return the SI-SDR improvement over the mixture in dB."""
    import torch

    from stethoscope.cli._demo_model import pit_loss, si_sdr_db

    training.model.eval()
    with torch.no_grad(), monitor.phase("val"):
        estimates = training.model(batch.mixture)
        monitor.observe(estimates=estimates, references=batch.sources, mixture=batch.mixture)
        reached = -pit_loss(estimates, batch.sources)
    training.model.train()
    given = si_sdr_db(batch.mixture[:, None].expand_as(batch.sources), batch.sources).mean()
    monitor.log(dict(zip(training.names, (reached, reached - given), strict=True)), phase="val")
    return float(reached - given)


def _stop(finding: Finding) -> None:
    if finding.severity == "error" and finding.step is not None:  # an audit's error leaves the training worth seeing
        raise _Stop


def _fresh(out: Path) -> Path:
    """The folder itself where it is new or empty, else the first of OUT-2, OUT-3 ... that is."""
    names = (out if number == 1 else out.with_name(f"{out.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists() or (name.is_dir() and not any(name.iterdir())))


@contextmanager
def _wandb_run(folder: Path, config: dict[str, Any], *, wanted: bool) -> Iterator[Any]:
    if not wanted:
        yield None
        return
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project="stethoscope-demo", mode="offline", dir=folder, config=config, settings=wandb.Settings(silent=True)
    ) as run:
        yield run


@contextmanager
def _findings_once() -> Iterator[None]:
    """Keep findings out of the log: the console has them. Other messages of ours stay."""
    logger = logging.getLogger("stethoscope")

    def no_finding(record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and record.args and isinstance(record.args[0], Finding))

    logger.addFilter(no_finding)
    try:
        yield
    finally:
        logger.removeFilter(no_finding)


def _say_where_to_look(console: Console, folder: Path, *, tensorboard: bool, wandb: bool) -> None:
    console.print(f"Records: {folder / 'records.jsonl'}", soft_wrap=True, markup=False)
    look = f"tensorboard --logdir {folder}" if tensorboard else 'not installed: pip install "stethoscope[tensorboard]"'
    console.print(f"TensorBoard: {look}", soft_wrap=True, markup=False)
    if wandb:
        console.print(f"W&B: wandb sync {folder / 'wandb' / 'latest-run'}", soft_wrap=True, markup=False)
