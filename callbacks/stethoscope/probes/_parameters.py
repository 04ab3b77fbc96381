"""Statistics of the weights: as the forward pass finds them, and as the optimizer leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from stethoscope import stats
from stethoscope._aside import is_aside
from stethoscope._protocols import Columns, Key, Readings
from stethoscope._shards import local, prefix
from stethoscope._tree import has_no_forward
from stethoscope.probes._hook import Hook, is_traced, takes_hooks
from stethoscope.probes._select import Pattern, as_patterns, includes, named_parameters, select, settle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe

KNOWN = ("norm", "update_ratio", "unchanged", "nonfinite")

_SMALL = 16384
"""Values up to which parameters of one shape are joined to be checked."""

SAMPLE = 2048
"""Values per parameter from which the update ratio is estimated."""


@dataclass(frozen=True)
class Parameters:
    """Weights: how large they are, how far a step has moved them, and whether a forward pass began with bad ones.

    **Records**, in training only, per parameter: `parameter/norm` (2-norm) at the end of the step;
    `parameter/update_ratio`, the norm of the
    step's change over the larger of the norms before and after, from a regular sample of up to 2048 values (about
    1e-3 is usual; 1 for a weight that starts at zero), and with it, of the model as a whole, `parameter/outward`: the cosine between a
    parameter's change and the parameter as it was, in [-1, 1], mean over those that have moved (1 where all of them grow in place, -1
    where they shrink, 0 where none has moved); `parameter/unchanged`, 1 where not one bit has changed over the
    step, and of bfloat16 and float16 `parameter/resting`, the share of the sampled values in [0, 1] of which not one bit has changed since the
    end of the first observed step (from the second one on); `parameter/nonfinite`, 1 where the norm was NaN or Inf when the step's first forward pass began, that is before
    this step's gradients could spread it (left out where it was finite).

    Of a parameter that is split over ranks (FSDP2, tensor parallelism) each rank measures its own part:
    `parameter/shard_norm`, `parameter/shard_unchanged`, and for the update ratio `parameter/shard_update_norm`, the norm
    of the part's change. The monitor makes the numbers of the whole of them, see `Monitor(reduce=...)`.

    **Cost:** on observed steps reads each weight once for the norm and twice for `unchanged`, and keeps the sample.
    Never waits for the device.

    Args:
        statistics: any of `norm`, `update_ratio`, `unchanged`, `nonfinite`.
        include: parameter name patterns (`"encoder.*"`), types of the owning module, or predicates of parameter name
            and owning module; empty for all.
        exclude: the same, to leave out.
        every: observe when `step % every == 0`; None takes the monitor's.

    Raises:
        ValueError: an unknown statistic.

    Examples:
        >>> Parameters(statistics=("norm", "update_ratio"), include="decoder.*").every is None
        True
    """

    statistics: tuple[str, ...] = KNOWN
    include: Pattern | Iterable[Pattern] = ()
    exclude: Pattern | Iterable[Pattern] = ()
    every: int | None = None

    def __post_init__(self) -> None:
        settle(self, KNOWN, "parameter")

    def attach(self, model: nn.Module) -> Attachment:
        """Choose the parameters of `model`."""
        return ParameterReader(self, model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` asks for nothing that this one does not record at least as often."""
        return isinstance(other, Parameters) and includes(self, other)


class ParameterReader:
    """What one `Parameters` remembers between the start and the end of an observed step."""

    def __init__(self, spec: Parameters, model: nn.Module) -> None:
        self.spec, self.model = spec, model
        self._parameters, self.notes = select(
            named_parameters(model), as_patterns(spec.include), as_patterns(spec.exclude), "Parameters"
        )
        self._flags: list[Columns] | None = None
        self._left: list[Columns] = []  # flags of the last step's end, where no forward pass was seen
        self._handles: list[RemovableHandle] = []
        self._spare: list[RemovableHandle] = []
        if "nonfinite" in spec.statistics:
            self._handles = self._hook([model])
            self._hook_all()
        self.failure: Exception | None = None
        self._sorted: list[_Group] = []
        self._places: list[_Place] = []  # of all parameters, when they were sorted
        self._lazy = False
        self._armed = self._training = False

    def _hook(self, modules: Iterable[nn.Module]) -> list[RemovableHandle]:
        return [each.register_forward_pre_hook(_Enters(self)) for each in modules if takes_hooks(each)]

    def _hook_all(self) -> None:
        if not self._spare:
            self._spare = self._hook(each for each in _entrances(self.model) if each is not self.model)

    def _unhook_all(self) -> None:
        for handle in self._spare:
            handle.remove()
        self._spare.clear()

    def _groups(self, *, thorough: bool = False) -> list[_Group]:
        """The parameters by device and dtype, sorted anew when the model has moved.

        To ask each parameter where it is takes 1 us; the first and the last one tell for the whole model, but not where
        only a part of it has moved, or a lazy part has got its shape.
        """
        if not self._parameters:
            return []
        asked = range(len(self._parameters)) if thorough or self._lazy else (0, -1)
        if not self._places or any(_place(self._parameters[i][1]) != self._places[i] for i in asked):
            groups: dict[tuple[torch.device, torch.dtype, str], _Group] = {}
            for name, parameter in self._parameters:
                if _readable(parameter):
                    place = parameter.device, parameter.dtype, prefix(parameter)
                    groups.setdefault(place, _Group([], [], place[2])).add(name, parameter)
            self._places = [_place(each) for _, each in self._parameters]
            self._lazy = any(isinstance(each, nn.parameter.UninitializedParameter) for _, each in self._parameters)
            self._sorted = list(groups.values())
        return self._sorted

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`. Takes the state before the step; weights do not change in other phases."""
        self._training = phase == "train"
        if not self._training:
            return
        self._armed, self._flags = on and self.failure is None, None
        if not on:
            self._left = []
        sampled, checked = "update_ratio" in self.spec.statistics, "unchanged" in self.spec.statistics
        if self._armed and (sampled or checked):
            with torch.no_grad():
                for group in self._groups(thorough=True):
                    values = group.values()
                    group.samples = _samples(values) if sampled else None
                    group.checksums = _checksums(values) if checked else None

    def enter(self, module: nn.Module) -> None:
        """The step's first forward pass begins: see which weights are bad before anything else is."""
        waits = (
            self._armed and self._training and self._flags is None
        )  # a validation's pass tells nothing of training's
        if waits and torch._C._current_graph_task_id() == -1:  # noqa: SLF001
            self._flags = []
            if module is self.model:
                self._unhook_all()  # most models are called as a whole, and a hook on each part is not free
            with torch.no_grad():
                self._flags = [group.flags() for group in self._groups()]

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        if not (self._armed and self._training):
            return Readings(())
        columns = self._begun_with()
        if set(self.spec.statistics) != {"nonfinite"}:
            with torch.no_grad():
                for group in self._groups(thorough=True):
                    columns += self._moved(group)
        return Readings(columns)

    def _begun_with(self) -> list[Columns]:
        """Flags of the step's beginning. In compiled code no hook has seen it: it is then how the last step has ended."""
        if self._flags is not None or "nonfinite" not in self.spec.statistics:
            self._left = []
            return list(self._flags or ())
        self._hook_all()
        before = self._left
        with torch.no_grad():
            self._left = [group.flags() for group in self._groups()]
        return before

    def _moved(self, group: _Group) -> Iterator[Columns]:
        names, values, rows, part = group.names, group.values(), range(len(group.names)), group.prefix
        if "norm" in self.spec.statistics or (part and group.samples is not None):
            yield Columns([Key(f"parameter/{part}norm", name) for name in names], _norms(values), rows)
        if group.samples is not None:
            after = _samples(values)
            # a model that was moved since the step began has nothing to compare with
            if after.device == group.samples.device:
                if part:
                    moved, said = _update_norms(group, values, after), f"{part}update_norm"
                else:
                    moved, said = _update_ratios(group.owners(values), group.samples, after, len(names)), "update_ratio"
                yield Columns([Key(f"parameter/{said}", name) for name in names], moved, rows)
                if not part and group is max(self._sorted, key=lambda each: len(each.names)):
                    outward = _outward(group.owners(values), group.samples, after, len(names))
                    yield Columns([Key("parameter/outward")], outward, [0])
        if group.checksums is not None:
            if group.half and not part:
                resting = group.resting(values)
                if resting is not None:
                    yield Columns([Key("parameter/resting", name) for name in names], resting, rows)
            sums = _checksums(values)
            if sums.device == group.checksums.device:
                keys = [Key(f"parameter/{part}unchanged", name) for name in names]
                yield Columns(keys, sums == group.checksums, rows)

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False
        self._unhook_all()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sorted.clear()


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Modules of which one is called before any weight is used, without most leaves."""
    if has_no_forward(model):
        return list(model.modules())
    found = [module for module in model.modules() if module is model or next(module.children(), None) is not None]
    # Lightning's training_step calls the model's layers, not the model, although there is a forward
    passed_by = [model, *filter(has_no_forward, model.modules())]
    return list(dict.fromkeys([*found, *(child for each in passed_by for child in each.children())]))


class _Enters(Hook):
    __slots__ = ("attached",)

    def __init__(self, attached: ParameterReader) -> None:
        self.attached = attached

    def __call__(self, module: nn.Module, args: object) -> None:
        if is_traced() or is_aside():
            return
        try:
            self.attached.enter(module)
        except Exception as error:  # instrumentation never stops a training
            self.attached.failure, self.attached._flags = error, []  # noqa: SLF001


class _Group:
    """Parameters of one device and dtype, whole or split, and their state before the step."""

    def __init__(self, names: list[str], members: list[nn.Parameter], prefix: str) -> None:
        self.names, self._members, self.prefix = names, members, prefix
        self.samples: Tensor | None = None
        self.checksums: Tensor | None = None
        self._owners: Tensor | None = None
        self._shares: Tensor | None = None
        self.half = False
        self._first: Tensor | None = None  # sample of the first observed step's end, of half precision
        self._exotic = False
        self._alike: list[tuple[bool, list[int]]] = []
        self._keys: list[Key] = []

    def add(self, name: str, parameter: nn.Parameter) -> None:
        self.names.append(name)
        self._members.append(parameter)
        self._exotic |= parameter.is_complex() or hasattr(parameter, "to_local")
        self.half = parameter.dtype in (torch.bfloat16, torch.float16)

    def values(self) -> Sequence[Tensor]:
        """The parameters as real tensors; of a DTensor, this rank's shard. Gradients must be off."""
        return [_local(each) for each in self._members] if self._exotic else self._members

    def flags(self) -> Columns:
        """Which hold NaN or Inf. Small ones of one shape are joined, since a call costs more than to read them."""
        if not self._alike:
            places: dict[tuple[torch.Size, bool], list[int]] = {}
            for i, each in enumerate(self._members):
                places.setdefault((each.shape, not self._exotic and each.numel() <= _SMALL), []).append(i)
            self._alike = [(small, indices) for (_, small), indices in places.items()]
            self._keys = [Key("parameter/nonfinite", self.names[i]) for _, indices in self._alike for i in indices]
        values, found = self.values(), list[Tensor]()
        for joined, indices in self._alike:
            members = [values[i] for i in indices]
            if joined:
                rows = (torch.cat if members[0].dim() else torch.stack)(members).reshape(len(members), -1)
                found.append(rows.mul_(0).sum(dim=1))
            else:
                found.append(_norms(members).mul_(0))
        # times zero is zero, or NaN where it was not finite
        flags = torch.cat(found).nan_to_num_(nan=1.0)
        return Columns(self._keys, flags, range(len(flags)), sparse=True)

    def owners(self, values: Sequence[Tensor]) -> Tensor:
        """For each value of the sample, the index of its parameter."""
        if self._owners is None:
            sizes = [stats.sample(value, SAMPLE).numel() for value in values]
            owners = [i for i, size in enumerate(sizes) for _ in range(size)]
            self._owners = stats.upload(owners, torch.int64, values[0].device)
        return self._owners

    def resting(self, values: Sequence[Tensor]) -> Tensor | None:
        """Share of each parameter's sample that is what it was at the first call, shape (parameters,); None at that call.

        Single steps do not tell: who rounds stochastically leaves most values alone in each, and moves all of them in some.
        """
        now = _samples(values)
        if self._first is None:
            self._first = now
            return None
        count, owners = len(values), self.owners(values)
        same = torch.zeros(count, dtype=now.dtype, device=now.device).index_add_(
            0, owners, (now == self._first).to(now.dtype)
        )
        return same / torch.zeros_like(same).index_add_(0, owners, torch.ones_like(now))

    def shares(self, values: Sequence[Tensor]) -> Tensor:
        """For each parameter, how many of its values one value of the sample stands for."""
        if self._shares is None:
            sizes = [(value.numel(), stats.sample(value, SAMPLE).numel()) for value in values]
            shares = [numel / max(sampled, 1) for numel, sampled in sizes]
            self._shares = stats.upload(shares, stats.precision(values[0].dtype, values[0].device), values[0].device)
        return self._shares


_Place: TypeAlias = "tuple[type, torch.device, torch.dtype]"


def _place(parameter: nn.Parameter) -> _Place:
    # the class of a lazy parameter changes when it gets its shape
    return type(parameter), parameter.device, parameter.dtype


def _readable(parameter: nn.Parameter) -> bool:
    return (
        not isinstance(parameter, nn.parameter.UninitializedParameter)
        and parameter.layout is torch.strided
        and (parameter.is_floating_point() or parameter.is_complex())
        and parameter.numel() > 0
    )


def _local(parameter: Tensor) -> Tensor:
    value = local(parameter)
    return torch.view_as_real(value) if value.is_complex() else value


def _update_ratios(owners: Tensor, before: Tensor, after: Tensor, count: int) -> Tensor:
    """Norm of the change over the larger norm, per parameter, from flat samples."""
    largest = torch.maximum(_squares(owners, before, count), _squares(owners, after, count)).sqrt()
    return _squares(owners, after - before, count).sqrt() / largest.clamp(min=torch.finfo(largest.dtype).tiny)


def _outward(owners: Tensor, before: Tensor, after: Tensor, count: int) -> Tensor:
    """Cosine between change and weight, mean over the parameters that have moved, shape (1,), from flat samples."""
    change = after - before
    moved, size = _squares(owners, change, count), _squares(owners, before, count)
    along = torch.zeros_like(size).index_add_(0, owners, change * before)
    both = (moved * size).sqrt()
    return ((along / both.clamp(min=torch.finfo(both.dtype).tiny)).sum() / (both > 0).sum().clamp(min=1)).view(1)


def _update_norms(group: _Group, values: Sequence[Tensor], after: Tensor) -> Tensor:
    """Norm of the change of each part, which adds up over ranks where a ratio does not."""
    assert group.samples is not None
    squares = _squares(group.owners(values), after - group.samples, len(values))
    return (squares * group.shares(values)).sqrt()


def _squares(owners: Tensor, sample: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=sample.dtype, device=sample.device).index_add_(0, owners, sample.square())


def _norms(values: Sequence[Tensor]) -> Tensor:
    """2-norms, shape (parameters,). Half precision is summed in float32, where its squares fit."""
    dtype = stats.precision(values[0].dtype, values[0].device)
    return torch.stack(torch._foreach_norm(list(values), 2, dtype))  # noqa: SLF001  # as clip_grad_norm_ does


def _samples(values: Sequence[Tensor]) -> Tensor:
    """A copy of a regular sample of every parameter, one after the other, flat."""
    dtype = stats.precision(values[0].dtype, values[0].device)
    return torch.cat([stats.sample(value, SAMPLE) for value in values]).to(dtype)


def _checksums(values: Sequence[Tensor]) -> Tensor:
    """Sums of the bits as integers, wrapping around: int64, shape (parameters,). One changed bit changes its sum."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values[0].element_size()]
    return torch.stack([value.view(integer).sum() for value in values])
