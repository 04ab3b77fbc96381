"""What optimizers hold, what they are handed, and what they keep."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_post_hook

from stethoscope import stats
from stethoscope._dropped import unhook_optimizers
from stethoscope._protocols import Columns, Key, Readings
from stethoscope.probes._decay import decay_of
from stethoscope.probes._hook import Hook
from stethoscope.probes._select import named_parameters
from stethoscope.probes._turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import FrameType

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe

FROZEN, UNHELD, RESTING, IDLE, TRAINED = range(5)
"""What `parameter/role` says: `requires_grad` is off; no optimizer holds it; its optimizer did not step; it stepped
without a gradient; it stepped with one."""

FOLLOWED = 4
"""Parameters whose gradient is compared with that of the step before."""

MOST = 100
"""Steps of one optimizer within one of the monitor's that are read; more come when nobody steps the monitor any more."""

_SCALED = GradScaler.step.__code__
_SMALL = 65536
_CARRIED = 0.02  # relative: bf16 sums are rounded to 0.4 %, a gradient that was zeroed differs by 100 %


@dataclass(frozen=True)
class Optimizers:
    """Which parameters an optimizer holds and steps, how large the gradients are that it gets, whether its state is finite.

    **Records**, in training only: `optimizer/steps`, calls of any optimizer's `step` in this
    process; `optimizer/held_fraction`, share of the parameters that require gradients and that an optimizer holds; per parameter `parameter/role`: 0 `requires_grad` is off, 1 no optimizer that has ever stepped holds it, 2 held,
    but its optimizer did not step, 3 stepped without a gradient, 4 stepped with one; `parameter/held`, 1 where an optimizer
    that stepped holds a parameter that is frozen and has a gradient left; `parameter/listed`, 1 where one that has ever stepped holds a
    parameter that is frozen (left out elsewhere); `gradient/applied_norm` per parameter,
    2-norm of the gradient as the optimizer has used it, after clipping; `gradient/scale`, by which a `GradScaler` has divided in between;
    `optimizer/in_eval`, how many modules a step found acting as in validation (BatchNorm, dropout), all of them and the model itself
    being in eval mode (left out where there are none); `optimizer/known`, optimizers that hold any of the parameters and have ever stepped;
    `optimizer/total`, calls of `step` since the monitor began; `optimizer/decay`, the largest share of a weight that a step's weight
    decay takes by itself, see `decay_of` (left out where it is none); `parameter/optimizers`, how often a parameter is stepped with one and
    the same gradient, by several or by one that lists it several times (left out where it is once); `gradient/carried`, share in [0, 1] of a few followed parameters whose gradient still holds that of the step before;
    `optimizer/nonfinite`, 1 where the state kept for a parameter holds NaN or Inf (left out where it does not).

    **Cost:** one global hook on optimizers, which counts and compares two numbers per step; on observed steps two reductions per
    parameter and one per tensor of the optimizer's state, fused. Never waits for the device.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> Optimizers(every=10).every
        10
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Listen to all optimizers of this process."""
        return OptimizerHooks(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` looks no more often."""
        return isinstance(other, Optimizers) and (self.every == other.every or self.every == 1)


class _Followed:
    """One parameter whose gradient is followed over two steps."""

    __slots__ = ("arrived", "before", "parameter", "total")

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.before: Tensor | None = None  # its gradient when the step began
        self.arrived: Tensor | None = None  # what backward passes have brought since
        self.total: Tensor | None = None  # what it is after the last of them

    def incoming(self, gradient: Tensor) -> None:
        if self.before is not None:
            self.arrived = gradient.detach().clone() if self.arrived is None else self.arrived + gradient.detach()

    def accumulated(self, parameter: Tensor) -> None:
        if self.before is not None and parameter.grad is not None:
            self.total = parameter.grad.detach().clone()

    def carried(self) -> Tensor | None:
        """1 where the gradient is the one of the step before and what has arrived since, 0-d; None if unknown."""
        before, arrived, total = self.before, self.arrived, self.total
        if before is None or arrived is None or total is None or arrived.shape != before.shape:
            return None
        size = torch.linalg.vector_norm(before.float())
        rest = torch.linalg.vector_norm(total.float() - arrived.float() - before.float())
        same: Tensor = (rest <= _CARRIED * size) & (size > 0)
        return same.float()


class OptimizerHooks:
    """The live hooks of one `Optimizers`."""

    def __init__(self, model: nn.Module) -> None:
        self.failure: Exception | None = None
        self._names = [(name, parameter) for name, _, parameter in named_parameters(model)]
        self._index = {id(parameter): i for i, (_, parameter) in enumerate(self._names)}
        self._known: dict[int, int] = {}  # optimizer -> number of parameters when it was last looked through
        self._held: set[int] = set()
        self._listed: Counter[int] = Counter()  # parameter -> how often one optimizer has it
        self._model = model
        self._moody = [module for module in model.modules() if _has_moods(module)]
        self._armed = False
        self._followed: list[_Followed] = []
        self._turns = Turns()
        self._holders: set[int] = set()
        self._total = 0
        self._handles: list[RemovableHandle] = [register_optimizer_step_post_hook(_Stepped(self))]
        self._following: list[RemovableHandle] = []
        self._roles: tuple[list[float], Tensor] | None = None
        self._forget()

    def _forget(self) -> None:
        self._steps = self._in_eval = 0
        self._steps_of: dict[int, int] = {}  # optimizer -> how many of them are its own
        self._stepped: dict[int, bool] = {}  # parameter -> whether it had a gradient
        self._held_frozen: set[int] = set()
        self._decay = 0.0
        self._columns: list[Columns] = []

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`. Takes the gradients that are still there from the step before."""
        if phase != "train":
            return
        self._release()
        self._forget()
        self._armed = on and self.failure is None
        if not self._armed:
            return
        self._turns.arm()
        # what no optimizer holds is not zeroed either, and does no harm
        for parameter in _few([each for _, each in self._names if id(each) in self._held or not self._known]):
            followed = _Followed(parameter)
            gradient = parameter.grad
            if gradient is not None and not gradient.is_sparse and not hasattr(gradient, "to_local"):
                followed.before = gradient.detach().clone()
                self._following.append(parameter.register_hook(_Incoming(self, followed)))  # type: ignore[no-untyped-call]
                self._following.append(parameter.register_post_accumulate_grad_hook(_Accumulated(self, followed)))  # type: ignore[no-untyped-call]
            self._followed.append(followed)

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has written."""
        self._total += 1
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._known.get(id(optimizer)) != count:
            self._known[id(optimizer)] = count
            ours = self._ours(optimizer)
            self._held |= {id(each) for each in ours}
            self._listed |= Counter(id(each) for each in ours)
            self._turns.holds(optimizer, ours)
            if ours:
                self._holders.add(id(optimizer))
        if not self._armed:
            return
        self._steps += 1
        self._steps_of[id(optimizer)] = its_own = self._steps_of.get(id(optimizer), 0) + 1
        if its_own > MOST:
            return
        # a frozen backbone, or its BatchNorm alone, is put in eval mode on purpose: then the rest trains
        if not self._model.training and not any(module.training for module in self._moody):
            self._in_eval = len(self._moody)
        ours = self._ours(optimizer)
        self._turns.stepped(optimizer, ours)
        self._decay = max(self._decay, decay_of(optimizer) if ours else 0.0)
        for each in ours:
            if each.requires_grad:
                self._stepped[id(each)] = each.grad is not None or self._stepped.get(id(each), False)
            elif each.grad is not None:
                self._held_frozen.add(id(each))
        self._read_norms("gradient/applied_norm", [(each, each.grad) for each in ours if each.requires_grad])
        scale = _scale()
        if scale is not None:
            # the scaler changes it in place, right after the step
            self._columns.append(Columns([Key("gradient/scale")], scale.detach().clone().view(1), [0]))
        self._read_norms(
            "optimizer/nonfinite", [(each, value) for each in ours for value in _state(optimizer, each)], flags=True
        )

    def _ours(self, optimizer: Optimizer) -> list[nn.Parameter]:
        return [each for group in optimizer.param_groups for each in group["params"] if id(each) in self._index]

    def _read_norms(self, name: str, found: Iterable[tuple[Tensor, Tensor | None]], *, flags: bool = False) -> None:
        places: dict[tuple[torch.device, torch.dtype], tuple[list[Key], list[Tensor]]] = {}
        for parameter, value in found:
            if value is None or value.layout is not torch.strided or hasattr(value, "to_local") or not value.numel():
                continue
            key = Key(name, self._names[self._index[id(parameter)]][0])
            keys, values = places.setdefault((value.device, value.dtype), ([], []))
            keys.append(key)
            values.append(torch.view_as_real(value) if value.is_complex() else value)
        for (device, dtype), (keys, values) in places.items():
            # squares of a second moment would overflow although it is finite; the largest value takes six times as long as the sum
            order = 1 if flags else 2
            norms = torch.stack(torch._foreach_norm(values, order, stats.precision(dtype, device)))  # noqa: SLF001
            numbers = (~norms.isfinite()).float() if flags else norms
            self._columns.append(Columns(keys, numbers, range(len(keys)), sparse=flags))

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        failure = self.failure or self._turns.failure
        if failure is not None:
            raise failure
        if not self._armed or not self._names:
            return Readings(())
        with torch.no_grad():
            names = [name for name, _ in self._names]
            device = self._names[0][1].device
            roles = [float(self._role(parameter)) for _, parameter in self._names]
            held = [float(id(parameter) in self._held_frozen) for _, parameter in self._names]
            count = len(names)
            trainable = [role for role in roles if role != FROZEN]
            share = sum(role != UNHELD for role in trainable) / max(1, len(trainable))
            many = {
                id(each): max(self._turns.twice.get(id(each), 1), self._listed[id(each)]) for _, each in self._names
            }
            twice = [(name, many[id(each)]) for name, each in self._names if many[id(each)] > 1]
            facts = {
                "optimizer/steps": float(self._steps),
                "optimizer/held_fraction": share,
                "optimizer/known": float(len(self._holders)),
                "optimizer/total": float(self._total),
                "optimizer/in_eval": float(self._in_eval),
                "optimizer/decay": self._decay,
            }
            listed = [name for name, each in self._names if not each.requires_grad and id(each) in self._held]
            values = [*roles, *held, *facts.values(), *(float(times) for _, times in twice), *[1.0] * len(listed)]
            numbers, start = self._upload(values, device), 2 * count
            always = len(facts) - 2
            keys = [Key(name) for name in facts]
            columns = [
                Columns(keys[:always], numbers, range(start, start + always)),
                Columns(keys[always:], numbers, range(start + always, start + len(facts)), sparse=True),
                Columns(
                    [Key("parameter/optimizers", name) for name, _ in twice],
                    numbers,
                    range(start + len(facts), len(values) - len(listed)),
                ),
                Columns(
                    [Key("parameter/listed", name) for name in listed],
                    numbers,
                    range(len(values) - len(listed), len(values)),
                ),
                Columns([Key("parameter/role", name) for name in names], numbers, range(count)),
                Columns([Key("parameter/held", name) for name in names], numbers, range(count, 2 * count), sparse=True),
                *self._columns,
            ]
            stepped = [each for each in self._followed if id(each.parameter) in self._stepped]
            carried = [flag for flag in (each.carried() for each in stepped) if flag is not None]
            if carried:
                flags = torch.stack([flag.to(carried[0].device, non_blocking=True) for flag in carried])
                columns.append(Columns([Key("gradient/carried")], flags.mean().view(1), [0]))
        self._turns.release()
        self._forget()
        return Readings(columns)

    def _role(self, parameter: nn.Parameter) -> int:
        if not parameter.requires_grad:
            return FROZEN
        if id(parameter) in self._stepped:
            return TRAINED if self._stepped[id(parameter)] else IDLE
        return RESTING if id(parameter) in self._held else UNHELD

    def _upload(self, values: list[float], device: torch.device) -> Tensor:
        if self._roles is None or self._roles[0] != values or self._roles[1].device != device:
            self._roles = values, stats.upload(values, torch.float32, device)
        return self._roles[1].clone()

    def _release(self) -> None:
        self._turns.release()
        for handle in self._following:
            handle.remove()
        self._following.clear()
        self._followed.clear()

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False
        self._release()
        unhook_optimizers(self._handles)


def _few(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """A few small parameters that get gradients, spread over the model."""
    lazy = nn.parameter.UninitializedParameter
    able = [each for each in parameters if each.requires_grad and not isinstance(each, lazy)]
    small = [each for each in able if 1 < each.numel() <= _SMALL] or able[:1]
    return small[:: max(1, len(small) // FOLLOWED)][:FOLLOWED]


def _has_moods(module: nn.Module) -> bool:
    """Whether a module acts otherwise in training than in validation."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _state(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    kept: Mapping[str, Any] = optimizer.state.get(parameter, {})
    return [value for value in kept.values() if isinstance(value, Tensor) and value.is_floating_point() and value.dim()]


def _scale() -> Tensor | None:
    """By what the `GradScaler` that calls the optimizer has divided its gradients, None where none does.

    Nothing of a scaler reaches an optimizer but the call itself, so that it is looked for among the callers.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001
    while frame is not None:
        if frame.f_code is _SCALED:
            scale = getattr(frame.f_locals["self"], "_scale", None)
            return scale if isinstance(scale, Tensor) else None
        frame = frame.f_back
    return None


class _Stepped(Hook):
    __slots__ = ("attached",)

    def __init__(self, attached: OptimizerHooks) -> None:
        self.attached = attached

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if torch.compiler.is_compiling() or self.attached.failure is not None:
            return
        try:
            with torch.no_grad():
                self.attached.stepped(optimizer)
        except Exception as error:  # instrumentation never stops a training
            self.attached.failure = error


class _Incoming(Hook):
    __slots__ = ("attached", "followed")

    def __init__(self, attached: OptimizerHooks, followed: _Followed) -> None:
        self.attached, self.followed = attached, followed

    def __call__(self, gradient: Tensor) -> None:
        try:
            self.followed.incoming(gradient)
        except Exception as error:
            self.attached.failure = error


class _Accumulated(Hook):
    __slots__ = ("attached", "followed")

    def __init__(self, attached: OptimizerHooks, followed: _Followed) -> None:
        self.attached, self.followed = attached, followed

    def __call__(self, parameter: Tensor) -> None:
        try:
            self.followed.accumulated(parameter)
        except Exception as error:
            self.attached.failure = error
