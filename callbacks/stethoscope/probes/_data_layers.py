"""How large the data is where it meets the first weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from stethoscope._shards import local
from stethoscope.probes._columns import Column
from stethoscope.probes._hook import Hook, is_traced, takes_hooks
from stethoscope.probes._looked_up import LookedUp

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle

WEIGHTED = (nn.Linear, _ConvNd, nn.RNNBase, nn.RNNCellBase)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
FEWEST_ITEMS = 4
MOST_VALUES = 2**18
"""Of one tensor that are looked at, whole items, evenly spread."""


class DataLayers:
    """Measures what trained linear, convolutional and recurrent layers are given where that is data, not activations.

    Data is what carries no history of the graph: it came from outside, through no trained weight; or what such data was put beside (`torch.cat`
    of numbers and embeddings). Each column (feature, channel) has
    an rms; the largest counts. What a normalisation follows at once may have any scale in common, so there the largest column is
    set against the median one, of at least 1. Their level is the rms of all of them, or three times the median column's where that is less:
    few large columns among others are no level. What is normalised before the next weights has none.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        self._handles: list[RemovableHandle] = []
        self._found: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}
        self._normalised: set[str] = set()
        self._normalised_later: set[str] = set()
        self._columns: dict[str, Column] = {}
        self._phase = "train"
        self._rows: dict[str, Tensor] = {}  # of embeddings, what the first item held
        self._alike: dict[str, Tensor] = {}
        self._asked: dict[str, LookedUp] = {}
        self._out: tuple[int, str] | None = None
        self._last: str | None = None  # the latest of them, as long as no other weights have run
        self.failure: Exception | None = None

    def arm(self, on: bool, phase: str = "train") -> None:
        """Hook the layers, or remove all hooks. Outside of training, those are looked at that were given data in training."""
        if not on or phase != self._phase:
            while self._handles:
                self._handles.pop().remove()
        self._phase = phase
        if not on or self._handles:
            return
        for name, module in self._model.named_modules():
            if not takes_hooks(module):
                continue
            if isinstance(module, WEIGHTED) and (_trained(module) if phase == "train" else name in self._columns):
                self._handles.append(module.register_forward_hook(_Layer(self, name)))
            elif isinstance(module, nn.Embedding) and module.num_embeddings > 2:
                self._handles.append(module.register_forward_hook(_Looked(self, name)))
            elif isinstance(module, NORMS) and phase == "train":
                self._handles.append(module.register_forward_pre_hook(_Norm(self)))

    def layer(self, name: str, module: nn.Module, x: object, out: object) -> None:
        """A layer has run."""
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter) or not x.is_floating_point():
            return
        if not self._wanted() or x.is_nested or x.numel() == 0 or x.dim() == 0:
            return
        if self._phase != "train":
            if name in self._columns:
                with torch.no_grad():
                    self._columns[name].take(_rows(module, local(x)), self._phase)
            return
        self._last = None
        if not torch.is_grad_enabled() or not _is_data(x):
            return
        with torch.no_grad():
            rows = _rows(module, local(x))  # of a DTensor, this rank's part
            rms = rows.square().mean(0).sqrt()
            self._columns.setdefault(name, Column()).take(rows, "train")
            largest, median = rms.amax(), rms.median()
            usual, level = median.clamp(min=1), torch.minimum(rms.square().mean().sqrt(), 3 * median)
            before = self._found.get(name)
            if before is not None and before[0].device == rms.device:  # a model may be moved while it is observed
                largest, usual = torch.maximum(largest, before[0]), torch.minimum(usual, before[1])
                level = torch.minimum(level, before[2])
            self._found[name] = largest, usual, level, len(rms)
        self._last = name
        if isinstance(out, Tensor):
            self._out = id(out), name

    def looked_up(self, name: str, x: object, rows: int) -> None:
        """An embedding has run: which rows it was asked for, and whether all items held the same sequence, the one of the observation before."""
        if isinstance(x, Tensor) and x.dim() > 0 and len(x) and not x.is_floating_point() and self._wanted():
            with torch.no_grad():
                self._asked.setdefault(name, LookedUp(rows)).take(local(x), self._phase)
        if self._phase != "train":
            return
        if not isinstance(x, Tensor) or x.dim() < 2 or len(x) < FEWEST_ITEMS or x[0].numel() < 2 or not self._wanted():
            return
        with torch.no_grad():
            x = local(x)
            items = x.reshape(len(x), -1)
            first, before = items[0], self._rows.get(name)
            self._rows[name] = first.clone()
            if before is None or before.shape != first.shape or before.device != first.device:
                return
            steps = first.diff()
            counts = (steps != steps[0]).any()  # positions count up, types of tokens are one number: the same by right
            alike = (items == before).all() & counts & (len(first) > 2)
            self._alike[name] = alike & self._alike.get(name, alike)

    def alike(self) -> dict[str, Tensor]:
        """Embedding to 1 where all calls since the last reading were given one sequence, the same for all items."""
        found, self._alike = self._alike, {}
        return {name: flag.float() for name, flag in found.items()}

    def one_row(self) -> dict[str, Tensor]:
        """Embedding to 1 where all items asked for one row, see `LookedUp`."""
        found = {name: asked.one_row() for name, asked in self._asked.items()}
        return {name: flag for name, flag in found.items() if flag is not None}

    def excess(self, phase: str) -> dict[str, Tensor]:
        """Embedding to what `LookedUp.excess` says of another phase."""
        found = {name: asked.excess(phase) for name, asked in self._asked.items()}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def norm(self, x: object) -> None:
        """A normalisation is about to run."""
        if self._out is not None and id(x) == self._out[0]:
            self._normalised.add(self._out[1])
        if self._last is not None:
            self._normalised_later.add(self._last)
        self._out = None

    def drift(self, phase: str) -> dict[str, Tensor]:
        """Layer to what `Column.read` says of another phase; learn from training."""
        found = {name: column.read(phase) for name, column in self._columns.items()}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def levels(self) -> dict[str, Tensor]:
        """Layer to its level, since the last `read`."""
        return {name: level for name, (_, _, level, _) in self._found.items() if name not in self._normalised_later}

    def read(self) -> dict[str, Tensor]:
        """Layer to its number, since the last call."""
        found = {
            name: largest / usual if name in self._normalised else largest
            for name, (largest, usual, _, columns) in self._found.items()
            if columns > 1 or name not in self._normalised
        }
        self._found, self._out, self._last = {}, None, None
        self._normalised.clear()
        self._normalised_later.clear()
        return found


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_data(x: Tensor) -> bool:
    """Whether a tensor, or a part that it was put together of, came from outside."""
    node = x.grad_fn
    if node is None:
        return x.is_leaf
    return node.name().startswith("CatBackward") and any(part is None for part, _ in node.next_functions)


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """(rows, columns) of what a layer is given, columns being features or channels."""
    x = x.detach()
    if isinstance(module, _ConvNd):
        axes = len(module.kernel_size)
        if x.dim() <= axes:
            return x.float().reshape(-1, 1)
        x = x.movedim(-axes - 1, -1)
    if x.dim() > 1:
        x = x[:: -(-x.numel() // MOST_VALUES)]
    return x.float().reshape(-1, x.shape[-1])


class _Layer(Hook):
    """Called after a layer."""

    __slots__ = ("name", "owner")

    def __init__(self, owner: DataLayers, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if is_traced() or not args or self.owner.failure is not None:
            return
        try:
            self.owner.layer(self.name, module, args[0], output)
        except Exception as error:  # instrumentation never stops a training
            self.owner.failure = error


class _Norm(Hook):
    """Called before a normalisation."""

    __slots__ = ("owner",)

    def __init__(self, owner: DataLayers) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if is_traced() or not args:
            return
        try:
            self.owner.norm(args[0])
        except Exception as error:  # instrumentation never stops a training
            self.owner.failure = error


class _Looked(Hook):
    """Called after an embedding."""

    __slots__ = ("name", "owner")

    def __init__(self, owner: DataLayers, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if is_traced() or not args or self.owner.failure is not None or not isinstance(module, nn.Embedding):
            return
        try:
            self.owner.looked_up(self.name, args[0], module.num_embeddings)
        except Exception as error:  # instrumentation never stops a training
            self.owner.failure = error
