"""Lightning: one callback for `lightning` and `pytorch_lightning` alike."""

from __future__ import annotations

import importlib
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stethoscope._monitor import Monitor
from stethoscope._protocols import Probe, Sink, Watch  # noqa: TC001  # LightningCLI reads the annotations
from stethoscope.integrations import _monitored
from stethoscope.integrations._keep_out import for_the_user, keeps_out
from stethoscope.integrations._options import monitor_options
from stethoscope.watches import MetricSchema, unknown_monitors

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def _callback_base() -> Any:
    packages = ("lightning.pytorch", "pytorch_lightning")
    # the one in use goes first, since importing the other takes seconds and its CLI would not accept the callback
    for package in sorted(packages, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise ImportError('MonitorCallback needs Lightning: pip install "stethoscope[lightning]".')


if not TYPE_CHECKING:
    Callback = _callback_base()


class MonitorCallback(Callback):  # type: ignore[misc]  # Lightning is not there for everybody who checks types
    """Observes a LightningModule with a `Monitor` of its own.

    A step is an optimizer step, whatever `accumulate_grad_batches` says; a batch of a manual optimisation in which
    several optimizers step is one step. Recorded at every step: `loss`, as `training_step` returned it (mean over the
    accumulated batches; several `manual_backward` calls in a batch are `loss`, `loss/1` ...), and learning rates. Tensors that
    `training_step` returns beside it (`{"loss": ..., "logits": ..., "targets": ...}`) are given to `Monitor.step`.
    Validation and test loops are recorded under the phases `val` and `test`, with the metrics that they logged; what
    training logged follows at the end of the epoch. The sanity check is not recorded. See docs/lightning.md.

    Args:
        preset: name of a function in `stethoscope.presets`; None for nothing but what follows.
        probes: what else to measure. A probe goes before the preset's probe of the same class.
        watches: what else to decide.
        sinks: where to write, see `Monitor`. None writes to all loggers of the trainer.
        every: observe a step when `step % every == 0`.
        guard: see `Monitor`.
        planned_steps: optimizer steps that the run will make; None takes the trainer's estimate.
        reduce: see `Monitor`.

    Attributes:
        monitor: that of the fit, validation or test under way, or of the last one, closed; None before the first.
        given_up: whether an error of ours has ended the observation, for good.

    Raises:
        TypeError: a part that is none, such as a class in place of an object.
        ValueError: no such preset, or an argument that `Monitor` does not accept.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> callback = MonitorCallback(every=10)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
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
        super().__init__()
        self._options = monitor_options(preset, probes, watches, sinks, every, guard, planned_steps)
        self._options["reduce"] = reduce
        self._guard = guard
        self._sinks = sinks
        self._key: dict[str, object] = {
            "preset": preset,
            "probes": _stable(probes),
            "watches": _stable(watches),
            "sinks": _stable(sinks),
            "every": every,
            "planned_steps": planned_steps,
        }
        self.monitor: Monitor | None = None
        self.given_up = False
        self._observing = False  # whether the monitor is open
        self._fitting = False
        self._state: dict[str, Any] = {}  # of the last monitor, or from a checkpoint
        self._phase = ExitStack()
        self._counted = 0  # the trainer's global_step at our last step
        self._losses: dict[str, list[Tensor]] = {}  # since then
        self._rates: dict[str, float | Tensor] = {}  # likewise
        self._backwards = 0  # in this batch
        self._before_epoch: dict[str, Tensor] = {}  # metrics that training has not logged in this epoch
        self._overwritten: dict[str, Tensor] = {}  # metrics of this epoch's training that validation logged as well
        self._before_phase: dict[str, Tensor] = {}  # metrics that the phase under way has not logged
        self._epoch_over = False  # whether its metrics are still to be taken
        self._names = ""  # of metrics: "new" after the first training batch of a fit, then "judged"

    # -- a monitor's life --------------------------------------------------------------------------------------------

    @keeps_out
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whether this is a fit."""
        self._fitting = stage == "fit"

    @keeps_out
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put hooks on the model, which is on its device by now, before anything compiled is called."""
        self._open(trainer, pl_module)
        self._before_epoch, self._names, self._epoch_over = {}, "", False

    @keeps_out
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint or the last fit of this trainer ended: all state is restored by now."""
        monitor = self._at_work()
        self._counted = trainer.global_step
        if trainer.global_step:
            monitor.load_state_dict(self._state or {**monitor.state_dict(), "step": _steps_made(trainer, pl_module)})
        if monitor.planned_steps is None:
            monitor.planned_steps = _planned_steps(trainer)

    @keeps_out
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off. Lightning calls nothing else after an exception."""
        self._take_epoch(trainer)
        self._close()

    @keeps_out
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off and write everything, before the loggers close."""
        self._close()

    @keeps_out
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do the same after a validation or test of its own."""
        self._close()

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        sinks = _loggers(trainer) if self._sinks is None else self._sinks
        # a validation or test of its own has no optimizer to guard
        guard = self._guard if trainer.optimizers else None
        with for_the_user():
            self.monitor = Monitor(pl_module, trainer.optimizers, sinks=sinks, guard=guard, **self._options)
        self._observing = True
        self._losses, self._rates = {}, {}

    def _close(self) -> None:
        if self.monitor is None or not self._observing:
            return
        self._observing = False
        try:
            self._phase.close()
        finally:
            self.monitor.close()
            self._state = self.monitor.state_dict()

    def give_up(self, error: Exception) -> None:
        """Say that this callback has failed, and let go of the model. The checkpoints keep what was known last."""
        if self.monitor is not None and self._observing:
            self.monitor._notes.disabled(self, "integration", error)  # noqa: SLF001 - it is one of its parts
        self._close()

    def _at_work(self) -> Monitor:
        assert self.monitor is not None
        return self.monitor

    # -- steps -------------------------------------------------------------------------------------------------------

    @keeps_out
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Offer the batch to the probes."""
        self._judge_names(trainer)
        self._backwards = 0
        self._at_work().observe(batch=batch)

    @keeps_out
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss with its graph, without waiting for the device: what the graph has saved goes with backward."""
        if loss.numel() != 1:
            return
        self._at_work().observe(loss=loss)  # for the guard, which decides before the optimizer writes
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # Lightning has divided it
            name = "loss"  # also where LBFGS evaluates it several times
        else:
            name = f"loss/{self._backwards}" if self._backwards else "loss"
            self._backwards += 1
        self._losses.setdefault(name, []).append(loss)

    @keeps_out
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keep the learning rates: at the end of the batch the schedulers have moved on."""
        if self._rates:
            return
        groups = [group for each in trainer.optimizers for group in each.param_groups]
        rates = {f"lr/{i}" if i else "lr": group.get("lr") for i, group in enumerate(groups)}
        self._rates = {
            name: rate.clone() if isinstance(rate, Tensor) else rate for name, rate in rates.items() if rate is not None
        }

    @keeps_out
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the step if an optimizer has stepped in this batch."""
        self._names = self._names or "new"
        if trainer.global_step == self._counted:
            return
        self._counted = trainer.global_step
        losses = {name: torch.stack(each).mean() if len(each) > 1 else each[0] for name, each in self._losses.items()}
        rates, self._losses, self._rates = self._rates, {}, {}
        self._at_work().step(**{**_answers(outputs), **losses, **rates})

    @keeps_out
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last epoch's metrics. Say so if Lightning has counted no optimizer step."""
        self._take_epoch(trainer)
        if trainer.global_step == 0:
            logging.getLogger("stethoscope").warning(
                "MonitorCallback has recorded no step: Lightning has counted no optimizer step. In a manual optimisation "
                "take the optimizers from self.optimizers(), without use_pl_optimizer=False."
            )

    # -- phases and metrics ------------------------------------------------------------------------------------------

    @keeps_out
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record under the phase `val`, except for the sanity check."""
        if not trainer.sanity_checking:
            self._judge_names(trainer)
            self._enter(trainer, pl_module, "val")

    @keeps_out
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to training, and take what validation has logged."""
        if not trainer.sanity_checking:
            self._leave(trainer, "val")

    @keeps_out
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record under the phase `test`."""
        self._enter(trainer, pl_module, "test")

    @keeps_out
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the test has logged."""
        self._leave(trainer, "test")

    @keeps_out
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of the last epoch: they stay in the trainer until they are logged again."""
        self._take_epoch(trainer)
        self._before_epoch, self._overwritten = dict(trainer.callback_metrics), {}

    @keeps_out
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is over; the module's hook of the same name comes after this one and may log."""
        self._judge_names(trainer)
        self._epoch_over = True

    def _take_epoch(self, trainer: Trainer) -> None:
        """Take what training has logged in the epoch that is over."""
        if self._epoch_over:
            self._epoch_over = False
            logged = {**self._overwritten, **_new(trainer.callback_metrics, self._before_epoch)}
            self._at_work().log(_without_forks(logged), phase="train")

    def _judge_names(self, trainer: Trainer) -> None:
        """Compare names, once the first training batch is over for the module and all callbacks."""
        if self._names != "new":
            return
        self._names = "judged"
        try:
            known = _monitored.lightning_known(trainer)
            absent = _monitored.lightning_absent(trainer)
            found = unknown_monitors(_monitored.lightning(trainer), known, absent=absent)
            schemas = [each for each in self._options["watches"] if isinstance(each, MetricSchema)]
            said = [finding for schema in schemas for finding in schema.compare(known)]
            # what is logged now and then is no news in the first batch
            found += [finding for finding in said if finding.severity != "info"]
        except Exception as error:  # Lightning's private parts may change; a training without this check is no less one
            logging.getLogger("stethoscope").warning("Names of metrics could not be compared: %r", error)
            return
        for finding in found:
            self._at_work().add(finding)

    def _enter(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        if not self._observing:
            self._open(trainer, pl_module)
            if self._state:
                self._at_work().load_state_dict(self._state)
        self._before_phase = dict(trainer.callback_metrics)
        self._phase.enter_context(self._at_work().phase(phase))

    def _leave(self, trainer: Trainer, phase: str) -> None:
        self._phase.close()
        logged = _new(trainer.callback_metrics, self._before_phase)
        of_training = _new(self._before_phase, self._before_epoch)
        self._overwritten.update({name: of_training[name] for name in logged if name in of_training})
        self._before_epoch.update(logged)
        self._at_work().log(_without_forks(logged), phase=phase)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells several callbacks with different arguments apart in a checkpoint."""
        return str(self._generate_state_key(**self._key))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the monitor at work, or of the last one; plain data."""
        self._save()
        return self._state

    @keeps_out
    def _save(self) -> None:
        if self.monitor is not None and self._observing:
            self._state = self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the monitor needs it. A test of an earlier checkpoint does not turn back time."""
        if self._fitting or not self._state:
            self._state = state_dict


def _stable(parts: object) -> object:
    """Describe parts without memory addresses, which another process does not have."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(parts if isinstance(parts, str) or parts is None else _listed(parts)))


def _listed(parts: object) -> object:
    return list(parts) if isinstance(parts, Iterable) else parts


def _loggers(trainer: Trainer) -> list[Any]:
    # by name: it is another class in each of the two packages
    return [each for each in trainer.loggers if "DummyLogger" not in {base.__name__ for base in type(each).__mro__}]


def _planned_steps(trainer: Trainer) -> int | None:
    if any(type(each).__name__ == "GradientAccumulationScheduler" for each in trainer.callbacks):
        return None  # Lightning's estimate does not know what the next epochs bring
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # of Lightning's own; a training without a plan is no less a training
        return None
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def _steps_made(trainer: Trainer, pl_module: LightningModule) -> int:
    """Count the steps made before this callback came: in a manual optimisation, `global_step` counts each optimizer."""
    loop = trainer.fit_loop.epoch_loop
    if pl_module.automatic_optimization:
        return int(trainer.global_step)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _new(metrics: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Lightning makes a new tensor whenever it computes a metric, and names may be shared by train and val
    return {name: value for name, value in metrics.items() if value is not before.get(name)}


_FORK = re.compile(r"_(?:step|epoch)(?=$|/dataloader_idx_\d+$)")


def _without_forks(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out `x_step` and `x_epoch` where Lightning made them of `x`: it holds the same tensor as `x_epoch`."""
    whole = {name: _FORK.sub("", name) for name in metrics}
    forked = {whole[name] for name in metrics if name != whole[name] and metrics[name] is metrics.get(whole[name])}
    return {name: value for name, value in metrics.items() if name == whole[name] or whole[name] not in forked}


def _answers(outputs: object) -> dict[str, Tensor]:
    """What `training_step` has returned beside the loss, of the last of accumulated batches."""
    named = outputs if isinstance(outputs, Mapping) else {}
    return {name: each for name, each in named.items() if isinstance(each, Tensor) and each.numel() > 1}
