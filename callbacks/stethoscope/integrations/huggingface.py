"""Hugging Face: a callback for `transformers.Trainer`."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from stethoscope import sinks as _sinks
from stethoscope._dropped import weakly, when_dropped
from stethoscope._monitor import Monitor
from stethoscope.integrations import _monitored
from stethoscope.integrations._keep_out import for_the_user, keeps_out
from stethoscope.integrations._loss import Losses
from stethoscope.integrations._options import monitor_options
from stethoscope.integrations._validation import Validation
from stethoscope.watches import unknown_monitors

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError('MonitorTrainerCallback needs transformers: pip install "stethoscope[hf]".') from error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
    from typing_extensions import Self

    from stethoscope._protocols import Probe, Sink, Watch

log = logging.getLogger("stethoscope")

RIDING = 40
"""Series that go along with the Trainer's own log: it is also printed, line by line."""


class MonitorTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers brings no types
    """Observes the model of a `transformers.Trainer` with a `Monitor` of its own, from `train()` to its end.

    A step is an optimizer step (`state.global_step` counts them from 1, we from 0). Recorded at every step: `loss`, what
    `backward` was called on in it, which is the mean over the accumulated batches, and the learning rates. Evaluation inside
    of `train()` is the phase `val`; what the Trainer logs goes to `Monitor.log`, phase `train`, and what an evaluation returns,
    phase `val`. The state is kept in `trainer_state.json` of each checkpoint. See docs/huggingface.md.

    Args:
        preset: name of a function in `stethoscope.presets`; None for nothing but what follows.
        probes: what else to measure. A probe goes before the preset's probe of the same class.
        watches: what else to decide.
        sinks: where to write, see `Monitor`. None: up to 40 series go along with the Trainer's own log to all of
            `report_to`, which takes `attach`, and everything to the W&B run if `report_to` has one.
        every: observe a step when `step % every == 0`.
        guard: see `Monitor`. It looks at gradients after the Trainer has clipped them.
        planned_steps: optimizer steps that the run will make; None takes the Trainer's number.
        reduce: see `Monitor`.

    Attributes:
        monitor: that of the training under way, or of the last one, closed; None before the first.
        given_up: whether an error of ours has ended the observation, for good.

    Raises:
        TypeError: a part that is none, such as a class in place of an object.
        ValueError: no such preset, or an argument that `Monitor` does not accept.

    Examples:
        >>> callback = MonitorTrainerCallback(every=10, sinks="runs/today")
        >>> callback.monitor is None
        True
    """

    def __init__(
        self,
        preset: str | None = "first_aid",
        *,
        probes: Sequence[Probe] = (),
        watches: Sequence[Watch] = (),
        sinks: Sequence[Sink | str] | Sink | str | None = None,
        every: int = 50,
        guard: Literal["raise", "skip"] | None = None,
        planned_steps: int | None = None,
        reduce: bool | None = None,
    ) -> None:
        self._options = monitor_options(preset, probes, watches, sinks, every, guard, planned_steps)
        self._options["reduce"] = reduce
        self._guard: Literal["raise", "skip"] | None = guard
        self._sinks = sinks
        self._plain = {
            "preset": preset,
            "every": every,
            "guard": guard,
            "planned_steps": planned_steps,
            "reduce": reduce,
        }
        self._parts = bool(probes or watches or sinks is not None)  # what a checkpoint cannot hold
        self.monitor: Monitor | None = None
        self.given_up = False
        self._saved: dict[str, Any] = {}  # from a checkpoint
        self._last: dict[str, Any] = {}  # for a checkpoint
        self._lost = False  # whether transformers has made this callback anew from a checkpoint, without its parts
        self._first = False  # whether this callback is ahead of those of report_to
        self._losses: Losses | None = None
        self._validation: Validation | None = None
        self._rates: dict[str, float | Tensor] = {}
        self._riding = _Riding()
        self._logged: set[str] = set()
        self._judged = False

    def attach(self, trainer: Trainer) -> Self:
        """Put this callback first in the trainer's list, and close it when `trainer.train()` ends by an exception.

        Being first, its numbers reach `report_to` with the Trainer's own. The Trainer itself calls nothing after an
        exception. Takes the place of `callbacks=[...]`; both together are fine.

        Returns:
            This callback.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(each for each in callbacks if each is not self)]
        self._first = True
        train = trainer.train

        @functools.wraps(train)
        def train_and_close(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:
                self.close()

        trainer.train = train_and_close
        return self

    # -- a monitor's life --------------------------------------------------------------------------------------------

    @keeps_out
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Put hooks on the model, and go on where a checkpoint ended."""
        self.close()
        assert model is not None
        self._last = {}
        if self._lost:
            log.warning(
                "restore_callback_states_from_checkpoint=True has made MonitorTrainerCallback anew, without its probes, watches and "
                "sinks. Leave it False: the callback goes on where the checkpoint ended all the same."
            )
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # Accelerate's wrapper takes no hooks
        options = {**self._options, "planned_steps": self._options["planned_steps"] or state.max_steps or None}
        with for_the_user():
            monitor = Monitor(model, optimizer, sinks=self._where(args), guard=self._guard, **options)
        # where a checkpoint was made without this callback, transformers would miss the key at its next one
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step and isinstance(stored, dict):
            self._saved = stored.get("attributes", {}).get("_saved") or {}
        if state.global_step:
            monitor.load_state_dict(self._saved or {**monitor.state_dict(), "step": state.global_step})
        self.monitor, self._validation = monitor, Validation(monitor, [model])
        self._losses = Losses(weakly(self._loss_failed))
        when_dropped(monitor, [self._losses.close])
        self._logged, self._judged, self._saved = set(), False, {}

    @keeps_out
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off and write everything."""
        self.close()

    def close(self) -> None:
        """Take the hooks off and write everything. To be called after an exception: the Trainer then calls nothing."""
        losses, self._losses = self._losses, None
        validation, self._validation = self._validation, None
        if losses is None or validation is None or self.monitor is None:
            return
        losses.close()
        try:
            validation.close()
        finally:
            self.monitor.close()

    def give_up(self, error: Exception) -> None:
        """Say that this callback has failed, and let go of the model. Checkpoints keep what was known last."""
        if self.monitor is not None and self._losses is not None:
            self.monitor._notes.disabled(self, "integration", error)  # noqa: SLF001 - it is one of its parts
        self.close()

    @keeps_out
    def _loss_failed(self, error: Exception) -> None:
        raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _where(self, args: TrainingArguments) -> Any:
        if self._sinks is not None:
            return self._sinks
        trackers = [each for each in args.report_to if each != "none"]
        if not trackers:
            return ()
        if not self._first:
            log.warning(
                "MonitorTrainerCallback is not known to be ahead of the callbacks of report_to=%s, so its numbers do not reach "
                "them. Call callback.attach(trainer), or give it sinks=....",
                trackers,
            )
        run = _wandb_run() if "wandb" in trackers else None
        return [_sinks.Logger(self._riding, max_series=RIDING), *([run] if run is not None else [])]

    # -- steps -------------------------------------------------------------------------------------------------------

    @keeps_out
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keep the learning rates, and give the guard the loss: the optimizer is about to write."""
        if self.monitor is None or self._losses is None:
            return
        rates = [group.get("lr") for group in optimizer.param_groups]
        self._rates = {
            f"lr/{i}" if i else "lr": rate.clone() if isinstance(rate, Tensor) else rate
            for i, rate in enumerate(rates)
            if rate is not None
        }
        loss = self._losses.peek()
        if self._guard is not None and loss is not None:
            self.monitor.observe(loss=loss)

    @keeps_out
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the step."""
        if self.monitor is None or self._losses is None:
            return
        loss = self._losses.take()
        self.monitor.step(**({} if loss is None else {"loss": loss}), **self._rates)

    # -- metrics -----------------------------------------------------------------------------------------------------

    @keeps_out
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what training has logged, and send numbers along."""
        if self.monitor is None or self._losses is None or not logs:
            return
        if not self._evaluating(logs):
            self._logged |= set(logs)
            self.monitor.log(dict(logs), phase="train")
        logs.update(self._riding.take())

    @keeps_out
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Go back to training, and take what the evaluation has found."""
        if self.monitor is None or self._validation is None:
            return
        self._validation.leave()
        metrics = metrics or {}
        self.monitor.log(dict(metrics), phase="val")
        if not self._judged:
            self._judged = True
            asked = _monitored.huggingface(args)
            for finding in unknown_monitors(asked, {"train": self._logged, "val": list(metrics)}):
                self.monitor.add(finding)

    @keeps_out
    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Go back to training."""
        if self._validation is not None:
            self._validation.leave()

    def _evaluating(self, logs: Mapping[str, Any]) -> bool:
        running = self._validation is not None and self._validation.running
        return running or any(name.startswith("eval_") for name in logs)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes to `trainer_state.json`: our arguments as far as JSON holds them, our state."""
        self._save()
        return {
            "args": {**self._plain, "sinks": () if self._parts else None},
            "attributes": {"_saved": self._last, "_lost": self._parts},
        }

    @keeps_out
    def _save(self) -> None:
        if self.monitor is not None and self._losses is not None:
            self._last = self.monitor.state_dict()


class _Riding:
    """Numbers that wait for the Trainer's next log."""

    def __init__(self) -> None:
        self._waiting: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the last of each."""
        self._waiting.update(metrics)

    def take(self) -> dict[str, float]:
        """Return them once."""
        taken, self._waiting = self._waiting, {}
        return taken


def _wandb_run() -> Any:
    import wandb

    return wandb.run
