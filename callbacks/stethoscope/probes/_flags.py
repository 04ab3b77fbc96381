"""The path of `Activations(statistics=("nonfinite",))`: cheap enough for every step.

Whatever passes by is summed into a row of a tape; a sum is NaN or Inf when one of its terms is (or when finite terms of about
1e38 leave float32's range). Small tensors, whose call costs more than their values, are put off to the end of the pass and read
together, unless they are known to be changed in place. Which row belongs to which module is known to the host.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _is_tracing  # called at each call of each module: no function of ours around it
from torch._C import _set_grad_enabled as set_grad_enabled  # what torch.no_grad() calls, without its 2 us
from torch.compiler import is_compiling

from stethoscope._protocols import Columns, Key, Readings
from stethoscope._tree import tensors
from stethoscope.probes._compiled import Eagerly
from stethoscope.probes._hook import Hook
from stethoscope.probes._passes import MAX_CALLS, replaying
from stethoscope.probes._select import as_patterns, named_modules, select
from stethoscope.probes._tape import SMALL, Tape
from stethoscope.stats import measurable, upload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from stethoscope.probes._activations import Activations


class _Site:
    """One hooked module, and what it has passed on in the pass under way."""

    __slots__ = ("calls", "enters", "index", "name", "observed", "root")

    def __init__(self, index: int, name: str, observed: bool, enters: bool) -> None:
        self.index, self.name, self.observed, self.root = index, name, observed, name == ""
        self.enters = enters  # whether it has a pre-hook
        self.calls = 0


class _Column(NamedTuple):
    """One kind of flag: its keys, where each is found, and how rows of one key are joined if it has several."""

    masked: bool  # which of `Tape.levels`
    keys: list[Key]
    rows: list[int]
    join: tuple[Tensor, Tensor] | None
    sparse: bool

    def read(self, levels: Sequence[Tensor]) -> Columns:
        level = levels[self.masked]
        if self.join is None:
            return Columns(self.keys, level, self.rows, self.sparse)
        rows, keys = self.join
        joined = level.new_zeros(len(self.keys)).scatter_reduce_(0, keys, level[rows], "amax")
        return Columns(self.keys, joined, range(len(self.keys)), self.sparse)


class _Gathered:
    """What one phase has seen on one device since the last read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.tape = device, Tape(device)
        self.index = (
            -1 if device.index is None else device.index
        )  # as `get_device` has it, a third of the time of `device`
        self.codes: list[int] = []  # who
        self.numbers: list[int] = []  # which of the tensors
        self.rows: list[int] = []  # where each tensor's flags are on the tape; none yet where it is put off
        self.pending: list[tuple[int, int, Tensor, int]] = []  # code, number, tensor, version
        self.layout: tuple[tuple[list[int], list[int], list[int]], list[_Column]] = (([], [], []), [])


_INPUT, _OUTERMOST = 1, 2
_INDEX, _CALL, _SITE = 2, 8, 12
"""Bits of a code: input or output, outermost or not, six for the tensor, four for the call, the rest for the module."""
_NONE = -1
_MAX_TENSORS = 1 << (_CALL - _INDEX)


class FlagHooks:
    """The live hooks of one `Activations` that asks for flags alone."""

    def __init__(self, spec: Activations, model: nn.Module) -> None:
        self.spec, self.model = spec, model
        self.armed, self.active, self.depth = False, False, 0
        self.thread = get_ident()
        self.eagerly = Eagerly("Activations")
        self.failure: Exception | None = None
        self._phase = "train"
        self._gathered: dict[tuple[str, torch.device], _Gathered] = {}
        self.here: _Gathered | None = None  # where the last tensor went
        self.last: Tensor | None = None  # it
        self.last_version, self.last_number = -1, 0
        self.inputs = spec.inputs
        self.called: list[_Site] = []
        self.stable: set[int] = set()  # codes of small tensors that were not changed in place before their pass ended
        self._tried: list[tuple[int, Tensor, int]] = []  # candidates for it, with the version that was read
        self._paths: dict[int, str] = {}
        modules, self.notes = named_modules(model, "Activations")
        chosen, unmatched = select(modules, as_patterns(spec.include), as_patterns(spec.exclude), "Activations")
        self.notes += unmatched
        observed = {id(module) for _, module in chosen}
        self._sites: list[tuple[_Site, nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        for name, _, module in modules:
            if id(module) not in observed and next(module.children(), None) is None and name:
                continue
            site = _Site(len(self._sites), name, id(module) in observed, _may_write_inputs(module))
            self._sites.append((site, module))

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self.armed = on and (self.spec.phases is None or phase in self.spec.phases) and self.failure is None
        self.end()
        self._phase, self.here, self.depth = phase, None, 0
        # every step without torch.compile would be no compiled training
        self.eagerly.set(self.armed and self.spec.every != 1, self.spec.phases, phase)
        if self.armed and not self._handles:
            for site, module in self._sites:
                if site.enters:
                    self._handles.append(module.register_forward_pre_hook(_Before(self, site), with_kwargs=True))
                self._handles.append(module.register_forward_hook(_After(self, site), with_kwargs=True))
        elif not self.armed:
            self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self) -> None:
        """An outermost call begins: a new micro-batch, or no training at all."""
        self.end()
        self.depth = 0
        for site in self.called:
            site.calls = 0
        self.called.clear()
        self.active = (self._phase != "train" or self.model.training) and not replaying()

    def end(self) -> None:
        """An outermost call has ended: read what was put off, and hold no tensor any longer."""
        self.last, self.last_version = None, -1
        for code, x, version in self._tried:
            if x._version == version:  # noqa: SLF001  # the only way to see changes in place
                self.stable.add(code)
        self._tried.clear()
        if self.here is not None and self.here.pending:
            self._catch_up(self.here)

    def _catch_up(self, here: _Gathered) -> None:
        alike: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for code, number, x, version in here.pending:
            if x._version == version:  # noqa: SLF001
                alike.setdefault(x.shape, []).append((number, x))
            else:
                self.stable.discard(code)  # what it was is lost, and what it is now may be another module's fault
        here.pending.clear()
        with torch.no_grad():
            for members in alike.values():
                first = here.tape.write_together([x for _, x in members])
                for row, (number, _) in enumerate(members, first):
                    here.rows[number] = row

    def count(self, site: _Site) -> None:
        """A module is called once more in this pass."""
        if site.calls == 0:
            self.called.append(site)
        site.calls += 1

    def read_value(self, code: int, value: object) -> None:
        """Take the flags of a tensor, or of the tensors in a container. Gradients must be off."""
        if type(value) is Tensor:
            self.read_tensor(code, value)
        else:
            self._read_container(code, value)

    def read_tensor(self, code: int, value: Tensor) -> None:
        try:
            version = value._version  # noqa: SLF001
        except RuntimeError:  # inference tensors have none
            version = -1
        here = self.here
        if value is not self.last or version != self.last_version or here is None:
            if here is None or here.device != value.device:
                place = self._phase, value.device
                if here is not None:
                    self._catch_up(here)
                here = self.here = self._gathered.get(place) or self._gathered.setdefault(place, _Gathered(place[1]))
            small = version >= 0 and type(value) is Tensor and _is_small(value)
            if small and code in self.stable:
                here.pending.append((code, len(here.rows), value, version))
                here.rows.append(_NONE)
            else:
                real = value if small else _countable(value)
                if real is None:
                    return
                if small:
                    self._tried.append((code, value, version))
                here.rows.append(here.tape.write(real))
            self.last, self.last_version, self.last_number = value, version, len(here.rows) - 1
        here.codes.append(code)
        here.numbers.append(self.last_number)

    def _read_container(self, code: int, value: object) -> None:
        for i, (path, x) in enumerate(tensors(value)):
            if i < _MAX_TENSORS and (x.is_floating_point() or x.is_complex()):
                at = code | i << _INDEX
                if i and at & ~_OUTERMOST not in self._paths:
                    self._paths[at & ~_OUTERMOST] = f".{path}"
                self.read_tensor(at, x)

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        self.notes += self.eagerly.notes()
        columns: list[Columns] = []
        self.end()
        for (phase, _), gathered in self._gathered.items():
            if phase == self._phase and gathered.codes:
                levels = gathered.tape.levels().unbind()
                arrived = gathered.codes, gathered.numbers, gathered.rows
                if gathered.layout[0] != arrived:
                    gathered.layout = arrived, self._lay_out(gathered)
                columns += [column.read(levels) for column in gathered.layout[1]]
                gathered.codes, gathered.numbers, gathered.rows, gathered.tape.used = [], [], [], 0
        return Readings(columns)

    def _lay_out(self, gathered: _Gathered) -> list[_Column]:
        """Name the flags; the same every step until other tensors pass by."""
        plainly, masked = _Naming(masked=False, sparse=True), _Naming(masked=True, sparse=True)
        # one record stays although it is zero, so that silence and health differ; masked scores and log(0) are healthy
        returned = _Naming(masked=True, sparse=False)
        for code, number in zip(gathered.codes, gathered.numbers, strict=True):
            row = gathered.rows[number]
            if row == _NONE:
                continue
            module, call = self._sites[code >> _SITE][0].name, code >> _CALL & MAX_CALLS - 1
            side = "input_" if code & _INPUT else ""
            suffix = self._paths.get(code & ~_OUTERMOST, "")
            # a mask handed over beside the activations may hold -Inf and be healthy
            naming = masked if side and suffix else plainly
            naming.add(Key(f"activation/{side}nonfinite{suffix}", module, call), row)
            if code & _OUTERMOST:
                returned.add(Key(f"activation/outermost_nonfinite{suffix}", module, call), row)
        return [naming.column(gathered.device) for naming in (plainly, masked, returned) if naming.places]

    def detach(self) -> None:
        """See `Attachment`."""
        self.armed = False
        self.eagerly.release()
        self._release()
        self._gathered.clear()
        self._tried.clear()
        self.here, self.last = None, None


class _Naming:
    """Collects keys and rows of one column; a key comes several times when a step has several micro-batches."""

    def __init__(self, *, masked: bool, sparse: bool) -> None:
        self.masked, self.sparse = masked, sparse
        self.places: dict[Key, list[int]] = {}

    def add(self, key: Key, row: int) -> None:
        self.places.setdefault(key, []).append(row)

    def column(self, device: torch.device) -> _Column:
        rows = [row for several in self.places.values() for row in several]
        join = None
        if len(rows) > len(self.places):
            keys = [i for i, several in enumerate(self.places.values()) for _ in several]
            join = upload(rows, torch.int64, device), upload(keys, torch.int64, device)
        return _Column(self.masked, list(self.places), rows, join, self.sparse)


def _may_write_inputs(module: nn.Module) -> bool:
    """Whether inputs must be read before the module runs: it may change them in place, or it holds other modules.

    Modules of torch.nn without `inplace=True` leave their inputs alone, so one hook is enough for them.
    """
    return (
        next(module.children(), None) is not None
        or not type(module).__module__.startswith("torch.nn.modules.")
        or bool(getattr(module, "inplace", False))
    )


def _countable(x: Tensor) -> Tensor | None:
    """A tensor that can be summed into a tape: floating, strided, not empty if possible to tell; else None."""
    if not (x.is_floating_point() or x.is_complex()):
        return None
    plain = type(x) is Tensor and x.layout is torch.strided and not x.is_nested
    return x if plain and x.dtype in (torch.float16, torch.bfloat16) else measurable(x)


def _is_small(x: Tensor) -> bool:
    """Whether a call costs more than to read a tensor of this size."""
    return x.dtype is torch.float32 and 0 < x.numel() <= SMALL and x.layout is torch.strided and not x.is_nested


def _given(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    return args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())


class _Before(Hook):
    __slots__ = ("attached", "site")

    def __init__(self, attached: FlagHooks, site: _Site) -> None:
        self.attached, self.site = attached, site

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object] | None = None) -> None:
        attached, site = self.attached, self.site
        if is_compiling() or not attached.armed or get_ident() != attached.thread or _is_tracing() or kwargs is None:
            return
        try:
            if site.root or attached.depth == 0:
                attached.begin()
            attached.depth += 1
            if not (attached.active and site.observed):
                return
            call = min(site.calls, MAX_CALLS - 1)
            attached.count(site)
            if attached.inputs:
                with torch.no_grad():
                    attached.read_value(site.index << _SITE | call << _CALL | _INPUT, _given(args, kwargs))
        except Exception as error:  # instrumentation never stops a training
            attached.armed, attached.failure = False, error


class _After(Hook):
    __slots__ = ("attached", "code", "enters", "site")

    def __init__(self, attached: FlagHooks, site: _Site) -> None:
        self.attached, self.site = attached, site
        self.code, self.enters = site.index << _SITE, site.enters

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        attached = self.attached
        if is_compiling() or not attached.armed or get_ident() != attached.thread or _is_tracing():
            return
        try:
            if self.code not in attached.stable or not self._put_off(args, kwargs, output):
                grad = is_grad_enabled()
                set_grad_enabled(False)
                try:
                    self._read(args, kwargs, output)
                finally:
                    set_grad_enabled(grad)
        except Exception as error:  # instrumentation never stops a training
            attached.armed, attached.failure = False, error

    def _put_off(self, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> bool:
        """Whether this is a small module's first call in a pass, given what was just read: `_read` takes four times as long."""
        attached, site, here, last = self.attached, self.site, self.attached.here, self.attached.last
        if self.enters or site.calls or not (attached.depth and here and last is not None and attached.inputs):
            return False
        if kwargs or len(args) != 1 or args[0] is not last or type(output) is not Tensor or not _is_small(output):
            return False
        try:
            version = output._version  # noqa: SLF001  # the only way to see changes in place
            if last._version != attached.last_version or output.get_device() != here.index:  # noqa: SLF001
                return False
        except RuntimeError:  # inference tensors have no version
            return False
        number = len(here.rows)
        here.codes += (self.code | _INPUT, self.code)
        here.numbers += (attached.last_number, number)
        here.rows.append(_NONE)
        here.pending.append((self.code, number, output, version))
        attached.last, attached.last_version, attached.last_number = output, version, number
        attached.called.append(site)
        site.calls = 1
        return True

    def _read(self, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        attached, site = self.attached, self.site
        if self.enters:
            attached.depth -= 1
            if attached.active and site.observed:
                code = self.code | min(site.calls - 1, MAX_CALLS - 1) << _CALL
                attached.read_value(code if attached.depth else code | _OUTERMOST, output)
            if attached.depth == 0:
                attached.end()
            return
        if attached.depth == 0:
            attached.begin()
        if attached.active:
            code = self.code | min(site.calls, MAX_CALLS - 1) << _CALL
            attached.count(site)
            if attached.inputs:
                attached.read_value(code | _INPUT, args[0] if len(args) == 1 and not kwargs else _given(args, kwargs))
            attached.read_value(code if attached.depth else code | _OUTERMOST, output)
