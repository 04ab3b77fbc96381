"""Makes a sink out of what people have at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stethoscope.sinks._jsonl import Jsonl
from stethoscope.sinks._logger import Logger
from stethoscope.sinks._tensorboard import TensorBoard, is_summary_writer
from stethoscope.sinks._wandb import WandB, is_wandb_run

if TYPE_CHECKING:
    from stethoscope._protocols import Sink


def resolve(obj: Any) -> Sink:
    """Return the sink that writes to `obj`.

    A sink stays what it is; a path becomes `Jsonl`; a `torch.utils.tensorboard.SummaryWriter` and Lightning's
    TensorBoardLogger become `TensorBoard`; a W&B run and Lightning's WandbLogger become `WandB`; an `accelerate.Accelerator`,
    whose trackers get the numbers, and anything else with `log_metrics(metrics, step)` becomes `Logger`. No framework is imported to find out.

    Raises:
        TypeError: it is none of these.

    Examples:
        >>> type(resolve("runs/demo")).__name__
        'Jsonl'
    """
    if not isinstance(obj, type):
        if _is_sink(obj):
            return cast("Sink", obj)
        if isinstance(obj, str | Path):
            return Jsonl(obj)
        if is_wandb_run(obj):
            return WandB(obj)
        if is_summary_writer(obj):
            return TensorBoard(obj)
        if "Accelerator" in {base.__name__ for base in type(obj).__mro__}:
            return Logger(_Trackers(obj))
        if callable(getattr(obj, "log_metrics", None)):
            return _behind(obj) or Logger(obj)
    what = f"the class {obj.__qualname__} (call it first)" if isinstance(obj, type) else f"a {type(obj).__qualname__}"
    raise TypeError(
        f"Cannot write to {what}. Give a sink from stethoscope.sinks, a path, a SummaryWriter, a W&B run, or a logger with "
        "log_metrics(metrics, step)."
    )


def _is_sink(obj: object) -> bool:
    # Of the class: Lightning's dummies, for fast_dev_run and for ranks other than 0, answer to every name themselves.
    return all(callable(getattr(type(obj), name, None)) for name in ("open", "write", "close"))


@dataclass(frozen=True)
class _Trackers:
    """All trackers of an Accelerator."""

    accelerator: Any

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write to those that `init_trackers` has started."""
        self.accelerator.log(metrics, step=step)


def _behind(logger: Any) -> Sink | None:
    """Look for what a Lightning logger wraps, which takes histograms and findings as well."""
    names = {base.__name__ for base in type(logger).__mro__}
    if not names & {"TensorBoardLogger", "WandbLogger"}:
        return None
    experiment = logger.experiment
    if is_wandb_run(experiment):
        return WandB(experiment)
    return TensorBoard(experiment) if is_summary_writer(experiment) else None
