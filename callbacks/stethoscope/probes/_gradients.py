"""Statistics of gradients, read right after autograd has finished them and so before any clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from stethoscope import stats
from stethoscope._aside import is_aside
from stethoscope._protocols import Columns, Key, Readings
from stethoscope._shards import PREFIX, parts, prefix
from stethoscope.probes._hook import Hook
from stethoscope.probes._select import Pattern, as_patterns, includes, named_parameters, select, settle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe

KNOWN = ("norm", "nonfinite")

_Place: TypeAlias = "tuple[torch.device, torch.dtype, str]"


@dataclass(frozen=True)
class Gradients:
    """Gradients as autograd leaves them: before clipping, after the last micro-batch of the step.

    **Records**, in training only: `gradient/norm` per parameter (2-norm) and of all together (module `""`), and
    `gradient/nonfinite`, the number of NaN and Inf values, for parameters that have any, and of all together. With a
    `GradScaler` the gradients are scaled; under DDP they are this rank's own, before averaging. Of a parameter that is
    split over ranks (FSDP2, after averaging) each rank measures its own part as `gradient/shard_norm` and
    `gradient/shard_nonfinite`; in those of all together, what every rank holds counts by its share. The monitor makes
    the numbers of the whole of them, see `Monitor(reduce=...)`.

    **Cost:** a hook on each parameter on observed steps only, with one operation per statistic; nothing in between.

    Args:
        statistics: any of `norm`, `nonfinite`.
        include: parameter name patterns (`"encoder.*"`), types of the owning module, or predicates of parameter name
            and owning module; empty for all that require a gradient.
        exclude: the same, to leave out.
        every: observe when `step % every == 0`; None takes the monitor's.

    Raises:
        ValueError: an unknown statistic.

    Examples:
        >>> Gradients(statistics=("norm",), exclude="*.bias").statistics
        ('norm',)
    """

    statistics: tuple[str, ...] = KNOWN
    include: Pattern | Iterable[Pattern] = ()
    exclude: Pattern | Iterable[Pattern] = ()
    every: int | None = None

    def __post_init__(self) -> None:
        settle(self, KNOWN, "gradient")

    def attach(self, model: nn.Module) -> Attachment:
        """Choose the parameters of `model`; they are hooked while armed."""
        return GradientHooks(self, model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` asks for nothing that this one does not record at least as often."""
        return isinstance(other, Gradients) and includes(self, other)


class _Group:
    """The parameters of one device and precision, whole or split, and their numbers."""

    def __init__(self, members: Sequence[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype) -> None:
        self.names = [name for name, _ in members]
        self.parts = [parts(parameter) for _, parameter in members]
        self.shares: Tensor | None = None  # what each counts among all together, see GradientHooks._total
        names = self.names
        with torch.inference_mode(mode=False):
            self.norms = torch.zeros(len(names), dtype=dtype, device=device)
            self.bad = torch.zeros(len(names), dtype=torch.int64, device=device)
        self.norm_views, self.bad_views = self.norms.unbind(), self.bad.unbind()
        self.seen: dict[int, None] = {}  # in the order of their arrival


class GradientHooks:
    """The live hooks of one `Gradients`."""

    def __init__(self, spec: Gradients, model: nn.Module) -> None:
        self.spec, self._model = spec, model
        self._split = 1  # the most parts in which any parameter of the model lies
        self.failure: Exception | None = None
        self._parameters, self.notes = select(
            named_parameters(model), as_patterns(spec.include), as_patterns(spec.exclude), "Gradients"
        )
        self._handles: list[RemovableHandle] = []
        self._groups: dict[_Place, _Group] = {}

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`. Only the training phase has gradients of interest."""
        if phase != "train":
            return
        self._release()
        if not on or self.failure is not None:
            return
        wanted: dict[_Place, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self._parameters:
            # a lazy module's parameter takes no hook until its first call has given it a shape
            if parameter.requires_grad and not isinstance(parameter, nn.parameter.UninitializedParameter):
                place = parameter.device, stats.precision(parameter.dtype, parameter.device), prefix(parameter)
                wanted.setdefault(place, []).append((name, parameter))
        for place, members in wanted.items():
            group = self._groups.get(place)
            if group is None or group.names != [name for name, _ in members]:
                group = self._groups[place] = _Group(members, *place[:2])
                self._split = max(parts(each) for each in self._model.parameters())
            group.seen.clear()
            for index, (_, parameter) in enumerate(members):
                self._handles.append(parameter.register_post_accumulate_grad_hook(_Arrived(self, group, index)))  # type: ignore[no-untyped-call]

    def arrived(self, group: _Group, index: int, gradient: Tensor) -> None:
        """A parameter's gradient is complete for this backward pass; a later one writes over it."""
        with torch.no_grad():
            real = stats.measurable(gradient.coalesce().values() if gradient.is_sparse else gradient)
            if real is None or real.device != group.norms.device:
                return  # the model was moved since the step began
            real = real.to(group.norms.dtype)
            if "norm" in self.spec.statistics:
                torch.linalg.vector_norm(real, out=group.norm_views[index])
            if "nonfinite" in self.spec.statistics:
                group.bad_views[index].copy_(stats.nonfinite_count(real))
            group.seen[index] = None

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        columns: list[Columns] = []
        arrived = [(part, group) for (_, _, part), group in self._groups.items() if group.seen]
        groups = [group for _, group in arrived]
        for part, group in arrived:
            rows, names = list(group.seen), group.names
            if "norm" in self.spec.statistics:
                keys = [Key(f"gradient/{part}norm", names[row]) for row in rows]
                columns.append(Columns(keys, group.norms.clone(), rows))
            if "nonfinite" in self.spec.statistics:
                keys = [Key(f"gradient/{part}nonfinite", names[row]) for row in rows]
                columns.append(Columns(keys, group.bad.clone(), rows, sparse=True))
        if groups:
            columns += self._totals(groups)
        for group in groups:
            group.norms.zero_()
            group.bad.zero_()
            group.seen.clear()
        return Readings(columns)

    def _totals(self, groups: Sequence[_Group]) -> Iterator[Columns]:
        """All gradients together. Where some are split, what is whole counts by the share of one part."""
        home = groups[0].norms.device
        split, part = self._split, PREFIX if self._split > 1 else ""
        norms, bads = [], []
        for group in groups:
            norm, bad = group.norms, group.bad
            if min(group.parts) < split:
                if group.shares is None:
                    group.shares = stats.upload([each / split for each in group.parts], norm.dtype, norm.device)
                norm, bad = norm * group.shares.sqrt(), bad * group.shares
            norms.append(torch.linalg.vector_norm(norm).to(home, non_blocking=True))
            bads.append(bad.sum().to(home, non_blocking=True))
        if "norm" in self.spec.statistics:
            total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].dtype) for norm in norms]))
            yield Columns([Key(f"gradient/{part}norm")], total.view(1), [0])
        if "nonfinite" in self.spec.statistics:
            # a share of a count is no whole number
            bad = torch.stack([bad.to(norms[0].dtype) if part else bad for bad in bads]).sum()
            yield Columns([Key(f"gradient/{part}nonfinite")], bad.view(1), [0])

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def detach(self) -> None:
        """See `Attachment`."""
        self._release()
        self._groups.clear()


class _Arrived(Hook):
    __slots__ = ("attached", "group", "index")

    def __init__(self, attached: GradientHooks, group: _Group, index: int) -> None:
        self.attached, self.group, self.index = attached, group, index

    def __call__(self, parameter: Tensor) -> None:
        if torch.compiler.is_compiling() or parameter.grad is None or self.attached.failure is not None:
            return
        if is_aside(anywhere=True):
            return
        try:
            self.attached.arrived(self.group, self.index, parameter.grad)
        except Exception as error:  # instrumentation never stops a training
            self.attached.failure = error
