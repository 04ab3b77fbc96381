"""`stethoscope audit plan`: does a schedule happen in the steps that a run will make?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stethoscope.cli._show import show

if TYPE_CHECKING:
    from stethoscope.audits import PlanReport


def plan(
    start: Annotated[int, typer.Option(help="First optimizer step, counted from 1, at which it may act.")],
    stop: Annotated[int, typer.Option(help="Step at which it is complete.")],
    interval: Annotated[int, typer.Option(help="In between it acts at multiples of this.")] = 1,
    name: Annotated[str, typer.Option(help="What it is called.")] = "schedule",
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--planned-steps", help="Optimizer steps of the run; or give epochs and what follows."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batches: Annotated[int | None, typer.Option(help="Batches per epoch.")] = None,
    items: Annotated[int | None, typer.Option(help="Items per epoch, in place of batches.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items per batch.")] = None,
    drop_last: Annotated[bool, typer.Option("--drop-last", help="An incomplete last batch is dropped.")] = False,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    flush: Annotated[
        bool, typer.Option("--flush", help="Each epoch ends with a step, as with Lightning and transformers.")
    ] = False,
    max_steps: Annotated[int | None, typer.Option(help="Limit on optimizer steps.")] = None,
    restarted_at: Annotated[int, typer.Option(help="Steps made before the schedule's counter began anew.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say whether a schedule (sparsification, warm-up, unfreezing) is complete, unfinished or without effect."""

    def audit() -> PlanReport:
        from stethoscope import audits

        if (steps is None) == (epochs is None):
            raise ValueError("Give either --steps, or --epochs with --batches or with --items and --batch-size.")
        planned: float = steps or 0
        if epochs is not None:
            planned = audits.planned_steps(
                epochs=epochs,
                batches=batches,
                items=items,
                batch_size=batch_size,
                drop_last=drop_last,
                accumulate=accumulate,
                flush=flush,
                max_steps=max_steps,
            )
        return audits.plan(audits.Schedule(name, start, stop, interval), planned, restarted_at=restarted_at)

    show(audit, as_json=as_json)
