"""What the model is given, in every phase."""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stethoscope._protocols import Attachment, Columns, Key, Readings
from stethoscope._tree import tensors
from stethoscope.probes._hook import Hook, is_traced, takes_hooks
from stethoscope.probes._passes import replaying

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe

STATISTICS = ("mean", "rms", "absmax", "roughness", "length", "constant")

MAX_TENSORS = 8
"""Of one call that are told apart; a list of a thousand crops is not worth a thousand series."""

ENOUGH_VALUES = 8
"""Of an item that may count as constant: fewer are alike by chance, and one always is."""


@dataclass(frozen=True)
class Inputs:
    """Measures the tensors that the model is called with; where it has no `forward` of its own, those of the batch.

    **Records**, per phase, over all calls since the last reading: `input/mean`; `input/rms`; `input/absmax`;
    `input/roughness`, the rms of differences along the last axis over the rms, 0 for a constant and 1.41 for white noise (it
    falls with the bandwidth of audio and with the blur of images); `input/length`, size of the last axis; `input/constant`,
    share of items (first axis) of 8 and more values that are all equal, in [0, 1]. The first tensor carries the plain name, others their
    path, e.g. `input/rms.mask`. Token numbers (integers other than uint8) have a length only.
    **Cost:** one pre-hook on the model and about five passes over its input on observed steps; device, no wait.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> model = nn.Linear(4, 1)
        >>> attached = Inputs().attach(model)
        >>> attached.arm(True, "train")
        >>> _ = model(torch.tensor([[3.0, -4.0, 3.0, -4.0]]))
        >>> round(float(attached.read({})[Key("input/rms")]), 3)
        3.536
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Hook the model as a whole."""
        return InputsAttachment(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` records the same, not more often."""
        return isinstance(other, Inputs) and self.every in (1, other.every)


class _Before(Hook):
    """Called before each call of the model."""

    __slots__ = ("owner",)

    def __init__(self, owner: InputsAttachment) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_traced() or not self.owner.armed or get_ident() != self.owner.thread or replaying():
            return
        try:
            self.owner.take([*tensors(args), *tensors(kwargs)])
        except Exception as error:  # instrumentation never stops a training
            self.owner.armed, self.owner.failure = False, error


class _Gathered:
    """Sums over the calls of one phase, one column per tensor."""

    def __init__(self) -> None:
        self.sums: dict[
            str, Tensor
        ] = {}  # name to (calls, mean, mean square, mean square difference, length, constant)
        self.peaks: dict[str, Tensor] = {}
        self.tokens: set[str] = set()


class InputsAttachment:
    """The live hook of one `Inputs`."""

    def __init__(self, model: nn.Module) -> None:
        self.armed = False
        self.failure: Exception | None = None
        self.thread = get_ident()
        self._phases: dict[str, _Gathered] = {}
        self._phase = "train"
        self._handle: RemovableHandle | None = None
        if takes_hooks(model):
            self._handle = model.register_forward_pre_hook(_Before(self), with_kwargs=True)

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self.armed, self._phase = on and self._handle is not None, phase

    def take(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Add the tensors of one call."""
        gathered = self._phases.setdefault(self._phase, _Gathered())
        usable = [(path, x) for path, x in named if _readable(x)]
        with torch.no_grad():
            for i, (path, x) in enumerate(usable[:MAX_TENSORS]):
                name = f".{path}" if i else ""
                if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.uint8):
                    gathered.tokens.add(name)
                sums, peak = _measure(x)
                before = gathered.sums.get(name)
                if before is not None and before.device == sums.device:  # a model may be moved while it is observed
                    sums, peak = sums + before, torch.maximum(peak, gathered.peaks[name])
                gathered.sums[name], gathered.peaks[name] = sums, peak

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        if not self.armed:
            return {}
        if self._phase not in self._phases:
            # a model without a forward of its own (extract_features): the batch is the next best
            batch = [(name, x) for name, x in given.items() if name.partition("/")[0] == "batch"]
            if not batch:
                return {}
            self.take(batch)
        gathered = self._phases.pop(self._phase)
        columns = []
        for name, sums in gathered.sums.items():
            calls, mean, square, change, length, constant = sums.unbind()
            rough = torch.where(square > 0, change / square, torch.zeros_like(square)).sqrt()
            values = (
                mean / calls,
                (square / calls).sqrt(),
                gathered.peaks[name],
                rough,
                length / calls,
                constant / calls,
            )
            kept = [4] if name in gathered.tokens else list(range(len(STATISTICS)))
            columns.append(Columns([Key(f"input/{STATISTICS[i]}{name}") for i in kept], torch.stack(values), kept))
        return Readings(columns)

    def detach(self) -> None:
        """See `Attachment`."""
        self.armed = False
        self._phases.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _readable(x: Tensor) -> bool:
    # nested tensors have no common shape to ask for
    return not (x.is_nested or x.is_quantized) and x.layout == torch.strided and x.dim() > 0 and x.numel() > 0


def _measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """(calls, mean, mean square, mean square difference, length, share of constant items), and the largest absolute value."""
    length = float(x.shape[-1])
    x = torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    items = x.reshape(x.shape[0], -1)
    low, high = items.aminmax(dim=1)
    constant = (low == high).to(x.dtype).mean() if items.shape[1] >= ENOUGH_VALUES else x.new_zeros(())
    change = x.diff(dim=-1).square().mean() if x.shape[-1] > 1 else x.new_zeros(())
    one = x.new_ones(())
    sums = torch.stack([one, x.mean(), x.square().mean(), change, one * length, constant])
    return sums, torch.maximum(high.amax(), -low.amin())
