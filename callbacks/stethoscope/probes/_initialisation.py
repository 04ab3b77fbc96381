"""How weights begin: how much they amplify, and whether their units are copies of one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stethoscope import stats
from stethoscope._protocols import Columns, Key, Readings
from stethoscope.probes._drawn import FEWEST, drawn
from stethoscope.probes._select import named_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope._protocols import Attachment, Probe

LOOKS = 5
"""Observed steps that are looked at."""

_TRANSPOSED = nn.modules.conv._ConvTransposeNd  # noqa: SLF001  # only its base knows
_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,  # noqa: SLF001
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_ALIKE = 1e-5  # relative: units that start as copies and get the same gradient stay within rounding


@dataclass(frozen=True)
class Initialisation:
    """The gain of each weight of two dimensions or more, and the share of its units that are copies, in the first steps.

    **Records**, in training, as the first five observed steps find them, of weights that multiply features (`Linear`,
    convolutions and their like; no embeddings but those that are tied to one):
    `parameter/gain` = ||W|| / sqrt(outputs), the factor by which white inputs grow in rms (1 for Xavier, 1.41 for Kaiming, 0.58
    for PyTorch's default); `parameter/copies`, the share of outputs in [0, 1] whose weights, not all zero, are those of
    another output; `parameter/table_rms`, the root mean square of an embedding that is tied to nothing (1 for PyTorch's default), and `parameter/table_size`, its number of values; `parameter/constant`, 1 where all values of a layer's weight are one number other than zero (left out elsewhere). Weights that
    are frozen are left out. Of frozen ones too, at the first look: `parameter/drawn`, 1 where a layer's weight is as an initialisation has
    drawn it, see `_drawn.py` (left out elsewhere).

    **Cost:** three reads of each weight on five steps, four more on the first, then nothing. Never waits for the device.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> Initialisation().covers(Initialisation())
        True
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Choose the weights of `model`."""
        return _Weights(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` looks no more often."""
        return isinstance(other, Initialisation) and (self.every == other.every or self.every == 1)


class _Weights:
    """The weights of one model, and how often they were looked at."""

    def __init__(self, model: nn.Module) -> None:
        tables = (nn.Embedding, nn.EmbeddingBag)
        # a table that is tied to an output layer multiplies after all
        used = {
            id(p) for each in model.modules() if not isinstance(each, tables) for p in each.parameters(recurse=False)
        }
        self._weights = [
            (name, owner, parameter) for name, owner, parameter in named_parameters(model) if id(parameter) in used
        ]
        self._tables = [
            (name, p) for name, owner, p in named_parameters(model) if id(p) not in used and isinstance(owner, tables)
        ]
        self._looks = 0
        self._columns: list[Columns] = []

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`. Looks before the step: the first look is at the initialisation."""
        if phase == "train":
            self._columns = self._look() if on and self._looks < LOOKS else []

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        columns, self._columns = self._columns, []
        return Readings(columns)

    def _look(self) -> list[Columns]:
        self._looks += 1
        places: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = {}
        fresh: dict[tuple[torch.device, torch.dtype], list[tuple[str, nn.Parameter, Tensor]]] = {}
        with torch.no_grad():
            for name, owner, parameter in self._weights:
                weight = _by_output(parameter, transposed=isinstance(owner, _TRANSPOSED))
                if weight is not None and self._looks == 1 and isinstance(owner, _LAYERS):
                    fresh.setdefault((weight.device, weight.dtype), []).append((name, parameter, drawn(weight)))
                if weight is not None and parameter.requires_grad:
                    rows = weight.flatten(1)
                    # kernels that see one channel each may be equal and still compute different things
                    copies = _copies(rows) if weight.shape[1] > 1 else rows.new_zeros(())
                    constant = _constant(rows) if min(weight.shape[:2]) > 1 else rows.new_zeros(())
                    if not isinstance(owner, _LAYERS):
                        # gains and masks of other modules begin at one, and are no weights
                        copies, constant = copies * (1 - constant), torch.zeros_like(constant)
                    numbers = torch.stack((torch.linalg.vector_norm(rows) / len(rows) ** 0.5, copies, constant))
                    names, found = places.setdefault((numbers.device, numbers.dtype), ([], []))
                    names.append(name)
                    found.append(numbers)
            columns = [_rms(name, table) for name, table in self._tables if _plain(table)]
            for names, found in places.values():
                numbers = torch.stack(found)
                for i, kind in enumerate(("gain", "copies", "constant")):
                    keys = [Key(f"parameter/{kind}", name) for name in names]
                    columns.append(Columns(keys, numbers[:, i], range(len(names)), sparse=kind == "constant"))
            for weights in fresh.values():
                keys = [Key("parameter/drawn", name) for name, *_ in weights]
                columns.append(Columns(keys, _flags(weights), range(len(keys)), sparse=True))
            return columns

    def detach(self) -> None:
        """See `Attachment`."""
        self._columns, self._weights, self._tables = [], [], []


def _flags(weights: Sequence[tuple[str, nn.Parameter, Tensor]]) -> Tensor:
    """Of each, 1 where it is as drawn. Of frozen ones, only where most of those that can be told are: a layer of a backbone may look so by chance."""
    frozen = {name for name, each, _ in weights if not each.requires_grad and each.numel() >= FEWEST}
    if not frozen:
        return torch.stack([flag for *_, flag in weights])
    most = torch.stack([flag for name, _, flag in weights if name in frozen]).mean() > 0.5
    return torch.stack([flag * most if name in frozen else flag for name, _, flag in weights])


def _plain(parameter: nn.Parameter) -> bool:
    """Whether it is trained, whole, and has its shape."""
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    if lazy or not parameter.requires_grad or hasattr(parameter, "to_local"):
        return False
    return parameter.is_floating_point() and parameter.numel() > 0


def _rms(name: str, table: Tensor) -> Columns:
    rms = torch.linalg.vector_norm(table, dtype=stats.precision(table.dtype, table.device)) / table.numel() ** 0.5
    keys = [Key("parameter/table_rms", name), Key("parameter/table_size", name)]
    return Columns(keys, torch.stack([rms, torch.full_like(rms, table.numel())]), [0, 1])


def _by_output(parameter: nn.Parameter, *, transposed: bool) -> Tensor | None:
    """The weight, shape (outputs, inputs, ...); None for what does not multiply features."""
    if isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.is_floating_point():
        return None
    if parameter.dim() < 2 or hasattr(parameter, "to_local"):
        return None
    value = stats.measurable(parameter.transpose(0, 1) if transposed else parameter)
    return None if value is None or not value.numel() else value


def _constant(rows: Tensor) -> Tensor:
    """1 where all values are one number other than zero."""
    low, high = rows.aminmax()
    return ((low == high) & (high != 0)).to(rows.dtype)


def _copies(rows: Tensor) -> Tensor:
    """Share of rows, not all zero, that equal another one: told by the neighbours along one fixed direction."""
    direction = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).mul(0.7548776662).frac() - 0.4
    size = torch.linalg.vector_norm(rows, dim=1)
    place, order = (rows @ direction).sort()
    size = size[order]
    near = (place.diff().abs() <= _ALIKE * size[1:]) & (size.diff().abs() <= _ALIKE * size[1:]) & (size[1:] > 0)
    ends = torch.zeros(1, dtype=near.dtype, device=near.device)
    return (torch.cat((near, ends)) | torch.cat((ends, near))).to(rows.dtype).mean()
