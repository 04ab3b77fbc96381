"""What the model is given, in every phase."""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from stethoscope import stats
from stethoscope._protocols import Attachment, Columns, Key, Readings
from stethoscope._tree import callable_parts, has_no_forward, tensors
from stethoscope.probes._compiled import Eagerly
from stethoscope.probes._data_layers import DataLayers
from stethoscope.probes._hook import Hook, is_traced, takes_hooks
from stethoscope.probes._passes import replaying
from stethoscope.probes._repeats import FEWEST_VALUES, Repeats
from stethoscope.probes._variety import Variety

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe
    from stethoscope._record import Finding

STATISTICS = ("mean", "rms", "absmax", "roughness", "length", "constant", "items_db")
ROW = ("row_share", "row_share_in_training", "row")
VARIETY = ("items", "different", "different_in_batch", "different_elsewhere", "kept")
DRIFT = ("columns_changed", "column_change_db", "columns_shifted", "column_shift")

MAX_TENSORS = 8
"""Of one call that are told apart; a list of a thousand crops is not worth a thousand series."""

ENOUGH_VALUES = 8
"""Of an item that may count as constant: fewer are alike by chance, and one always is."""

MOST_VALUES = 2**20
"""Of one tensor that are measured, whole items, evenly spread."""


@dataclass(frozen=True)
class Inputs:
    """Measures the tensors that the model is called with, in every phase.

    The model as a whole is read; where it has no `forward`, or its parts are called one by one, the part that is called first;
    where no call can be seen (another thread), the batch that is given to `step`. Only one of them is read in a run.

    **Records**, per phase, over all calls since the last reading: `input/mean` and `input/rms` of the values other than exactly 0, so that
    padding, masks and dropout leave the level as it is; `input/absmax`; `input/roughness`, the rms of differences along the last axis
    over the rms, 0 for a constant and 1.41 for white noise (it falls with the bandwidth of audio and with the blur of images);
    `input/length`, size of the last axis; `input/constant`, share of items (first axis) of 8 and more values that are all equal, in
    [0, 1]; `input/items_db`, standard deviation of the items' levels (20 log10 of their rms). The first tensor of 8 and more values per item carries the plain name (the first of all where none has), others their path,
    e.g. `input/rms.mask`. Token numbers (integers other than uint8) have a length only.
    In training also: `input/repeated`, share of items that equal an earlier one of their batch in all tensors, 1 where all are alike
    (4 items of 8 values at least; constant ones do not count), and `input/returned`, share of these copies that the batch before had as
    well, `input/blank`, share of items that are one number all over in the main tensor and equal another one in all of them; from ten observed
    batches on, over the last 32, of data of eight different values per item and more: `input/items`, how many there were, `input/different` and
    `input/different_in_batch`, different ones among them and in the last batch, `input/different_elsewhere`, in other phases, `input/kept`, 1 where the last batch was
    the same tensor object as the one before (the same of the `batch` given to `step`, under the module name `batch`); `input/column_rms`, per trained linear, convolutional or recurrent layer that is given data, the largest rms of a column (feature
    or channel), over the median one (at least 1) where a normalisation follows at once; without a module: the largest of all; `input/level`, per such layer whose results are not normalised before the next
    weights, the rms of all columns, or three times that of the median one where that is less.
    `input/alike`, per embedding of more than two rows that is given sequences (of three and more): 1 where all items held one and the same, also at the
    observation before, 0 otherwise and for what counts up or is one number (positions, types of tokens).
    `input/one_row`, per such embedding that is given one number per item: 1 where all items (8 at least) ask for the same row, also at the observation before.
    In other phases, per embedding that is given sequences, of the row that has become more frequent by most: `input/row_share`, `input/row_share_in_training`,
    `input/row`; rows that half of the training sequences begin or end with (padding, marks) are left out. And, per layer that is given data, against the training observations so far (10 at least), per column, beyond 8 of their standard deviations:
    `input/columns_changed`, share of columns whose spread is off by more than 6 dB, and `input/column_change_db`, the largest change;
    `input/columns_shifted`, share whose mean is off by more than one spread, and `input/column_shift`, the largest shift, in spreads.
    `input/double`, in training: 1 where the data, as the model or `step(batch=...)` is given it, is float64 and no parameter is; nothing otherwise.
    `input/norms_in_training`, `input/dropouts_in_training`: BatchNorm and dropout modules that act as in training there, where the model is in train mode.
    **Cost:** hooks on observed steps only; about six passes over at most 2^20 values of each tensor, device, no wait. What
    torch.compile has compiled runs eagerly on observed training steps.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> model = nn.Linear(4, 1)
        >>> attached = Inputs().attach(model)
        >>> attached.arm(True, "train")
        >>> _ = model(torch.tensor([[3.0, -4.0, 3.0, -4.0]]))
        >>> round(float(attached.read({})[Key("input/rms")]), 3)
        3.536
        >>> attached.detach()
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Hook the model as a whole."""
        return InputsAttachment(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` records the same, not more often."""
        return isinstance(other, Inputs) and self.every in (1, other.every)


class _Before(Hook):
    """Called before each call of the model, or of the part that stands for it."""

    __slots__ = ("owner",)

    def __init__(self, owner: InputsAttachment) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if is_traced() or kwargs is None:
            return
        try:
            if self.owner.wanted():
                self.owner.called(module, args, kwargs)
        except Exception as error:  # instrumentation never stops a training
            self.owner.armed, self.owner.failure = False, error


class _Gathered:
    """Sums over the calls of one phase, one column per tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name to what `_measure` returns
        self.peaks: dict[str, Tensor] = {}
        self.tokens: set[str] = set()


class InputsAttachment:
    """The live hooks of one `Inputs`."""

    def __init__(self, model: nn.Module) -> None:
        self.armed = False
        self.failure: Exception | None = None
        self.thread = get_ident()
        self.notes: list[Finding] = []
        self._model = model
        self._phases: dict[str, _Gathered] = {}
        self._phase = "train"
        self._moving: dict[str, list[int]] = {}  # phase to BatchNorm and dropout modules that act as in training
        entries = [*([] if has_no_forward(model) else [model]), *callable_parts(model)]
        self._entries = [each for each in entries if takes_hooks(each)]
        self._source: nn.Module | str | None = None  # what is read: comparing two kinds of it would say nothing
        self._handles: list[RemovableHandle] = []
        self._repeats, self._layers = Repeats(model), DataLayers(model, self.wanted)
        self._called_with, self._batches = Variety(), Variety()
        self._double = False
        self._eagerly = Eagerly("Inputs")

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self.armed, self._phase = on and self.failure is None, phase
        self._eagerly.set(self.armed, None, phase)
        if self.armed and not self._handles:
            for entry in self._entries:
                self._handles.append(entry.register_forward_pre_hook(_Before(self), with_kwargs=True))
        elif not self.armed:
            self._release()
        self._layers.arm(self.armed, phase)

    def wanted(self) -> bool:
        """Whether a pass that is under way is one to be read."""
        return (
            self.armed
            and get_ident() == self.thread
            and (self._phase != "train" or self._model.training)
            and not replaying()
        )

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An entry is called: the first one ever is the one that is read from here on."""
        if self._source is None:
            self._source, self._entries = module, [module]
        if module is self._source:
            if self._phase != "train" and self._phase not in self._moving:
                self._moving[self._phase] = _in_train_mode(self._model)
            self.take([*tensors(args), *tensors(kwargs)])

    def _vary(self, variety: Variety, given: Iterable[Tensor]) -> None:
        main = next((x for x in given if _readable(x) and not x.is_complex() and x[0].numel() >= FEWEST_VALUES), None)
        if main is not None and main.dtype == torch.float64:
            self._double = all(p.dtype != torch.float64 for p in self._model.parameters())
        if main is not None and not (variety is self._batches and self._called_with.holds(main)):
            variety.take(main, self._phase)

    def take(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Add the tensors of one call."""
        gathered = self._phases.setdefault(self._phase, _Gathered())
        usable = [(path, _real(x)) for path, x in named if _readable(x)][:MAX_TENSORS]
        with torch.no_grad():
            main = next((i for i, (_, x) in enumerate(usable) if x[0].numel() >= ENOUGH_VALUES), 0)
            for i, (path, x) in enumerate(usable):
                name = "" if i == main else f".{path}"
                if not (x.is_floating_point() or x.dtype == torch.uint8):
                    gathered.tokens.add(name)
                sums, peak = _measure(x)
                before = gathered.sums.get(name)
                if before is not None and before.device == sums.device:  # a model may be moved while it is observed
                    sums, peak = sums + before, torch.maximum(peak, gathered.peaks[name])
                gathered.sums[name], gathered.peaks[name] = sums, peak
            if usable and self._phase == "train":
                self._repeats.take(usable[main][1], [x for i, (_, x) in enumerate(usable) if i != main])
            self._vary(self._called_with, [x for _, x in named])

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        """See `Attachment`."""
        failure = self.failure or self._layers.failure
        if failure is not None:
            raise failure
        self.notes += self._eagerly.notes()
        if not self.armed:
            return {}
        batch = [(name, x) for name, x in given.items() if name.partition("/")[0] == "batch"]
        if batch and self._phase not in self._phases and self._source in (None, "batch"):
            self._source = "batch"
            self.take(batch)
        elif batch:  # before noise, masks and crops that the loop adds to it
            with torch.no_grad():
                self._vary(self._batches, [x for _, x in batch])
        columns = self._statistics(self._phases.pop(self._phase, _Gathered()))
        drift = self._layers.drift(self._phase)
        columns += [
            Columns([Key(f"input/{name}", layer) for name in DRIFT], numbers, range(len(DRIFT)))
            for layer, numbers in drift.items()
        ]
        for layer, numbers in self._layers.excess(self._phase).items():
            columns.append(Columns([Key(f"input/{name}", layer) for name in ROW], numbers, range(len(ROW))))
        if self._phase == "train":
            columns += self._of_training()
        elif columns and (moving := self._moving.pop(self._phase, None)) is not None:
            keys = [Key("input/norms_in_training"), Key("input/dropouts_in_training")]
            device = columns[0].tensor.device
            columns.append(Columns(keys, stats.upload(list(map(float, moving)), torch.float32, device), [0, 1]))
        return Readings(columns) if columns else {}

    @staticmethod
    def _statistics(gathered: _Gathered) -> list[Columns]:
        columns = []
        for name, sums in gathered.sums.items():
            calls, mean, square, power, change, length, constant, levels = sums.unbind()
            rough = torch.where(power > 0, change / power, torch.zeros_like(power)).sqrt()
            level = (square / calls).sqrt()
            values = (
                mean / calls,
                level,
                gathered.peaks[name],
                rough,
                length / calls,
                constant / calls,
                levels / calls,
            )
            kept = [4] if name in gathered.tokens else list(range(len(STATISTICS)))
            columns.append(Columns([Key(f"input/{STATISTICS[i]}{name}") for i in kept], torch.stack(values), kept))
        return columns

    def _of_training(self) -> list[Columns]:
        columns = []
        if self._double:
            self._double = False
            columns.append(Columns([Key("input/double")], torch.ones(1), [0]))
        copies = self._repeats.read()
        if copies is not None:
            keys = [Key("input/repeated"), Key("input/returned"), Key("input/blank")]
            columns.append(Columns(keys, copies, [0, 1, 2]))
        for name, variety in (("", self._called_with), ("batch", self._batches)):
            counts = variety.read()
            if counts is not None:
                columns.append(Columns([Key(f"input/{each}", name) for each in VARIETY], counts, range(len(VARIETY))))
        alike = self._layers.alike()
        columns += [Columns([Key("input/alike", name)], flag.reshape(1), [0]) for name, flag in alike.items()]
        one = self._layers.one_row()
        columns += [Columns([Key("input/one_row", name)], flag.reshape(1), [0]) for name, flag in one.items()]
        levels = self._layers.levels()
        columns += [Columns([Key("input/level", name)], level.reshape(1), [0]) for name, level in levels.items()]
        layers = self._layers.read()
        if layers:
            values = torch.stack([value.to(next(iter(layers.values())).device) for value in layers.values()])
            keys = [Key("input/column_rms", name) for name in layers if name]
            rows = [i for i, name in enumerate(layers) if name]
            columns.append(Columns(keys, values, rows))
            columns.append(Columns([Key("input/column_rms")], values.amax(0, keepdim=True), [0]))
        return columns

    def detach(self) -> None:
        """See `Attachment`."""
        self.armed = False
        self._eagerly.release()
        self._release()
        self._layers.arm(False)
        self._phases.clear()

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _in_train_mode(model: nn.Module) -> list[int]:
    """Number of normalisations whose running statistics move, and of dropouts that drop, where the model as a whole is in train mode."""
    if not model.training:
        return [0, 0]
    modules = [module for module in model.modules() if module.training]
    norms = sum(isinstance(module, _BatchNorm) and module.track_running_stats for module in modules)
    return [norms, sum(isinstance(module, _DropoutNd) and module.p > 0 for module in modules)]


def _readable(x: Tensor) -> bool:
    # nested tensors have no common shape to ask for
    return stats.is_dense(x) and x.dim() > 0 and x.numel() > 0


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.detach().resolve_conj()).flatten(-2) if x.is_complex() else x.detach()


def _measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """What one call adds to the sums of a tensor, and its largest absolute value.

    1, mean and mean square of the values other than 0, mean square of all, mean square difference, length, share of constant items, standard deviation of
    the items' levels in dB.
    """
    length = float(x.shape[-1])
    x = x[:: -(-x.numel() // MOST_VALUES)]
    x = x if x.dtype == torch.float64 else x.float()
    items = x.reshape(x.shape[0], -1)
    low, high = items.aminmax(dim=1)
    constant = (low == high).to(x.dtype).mean() if items.shape[1] >= ENOUGH_VALUES else x.new_zeros(())
    change = x.diff(dim=-1).square().mean() if x.shape[-1] > 1 else x.new_zeros(())
    share = (x != 0).to(x.dtype).mean().clamp(min=1 / x.numel())
    one, power = x.new_ones(()), x.square().mean()
    # silent items have no level; of fewer than two there is no spread
    loud = items.square().mean(1)
    heard = (loud > 0).to(x.dtype)
    db, count = 10 * loud.clamp(min=1e-36).log10(), heard.sum().clamp(min=1)
    middle = (db * heard).sum() / count
    levels = (((db - middle).square() * heard).sum() / count).sqrt()
    sums = torch.stack([one, x.mean() / share, power / share, power, change, one * length, constant, levels])
    return sums, torch.maximum(high.amax(), -low.amin())
