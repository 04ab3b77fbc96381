"""The path of `Activations(statistics=("nonfinite",))`: cheap enough for every step.

Whatever passes by is summed into a row of a tape; a sum is NaN or Inf when one of its terms is (or when finite terms of about
1e38 leave float32's range). Small tensors, whose call costs more than their values, are put off to the end of the pass and read
together, unless they are known to be changed in place. Which row belongs to which module is known to the host.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stethoscope._protocols import Columns, Key, Readings
from stethoscope._tree import tensors
from stethoscope.probes._compiled import Eagerly
from stethoscope.probes._flag_hooks import (
    CALL,
    INDEX,
    INPUT,
    NONE,
    OUTERMOST,
    SITE,
    After,
    Before,
    Site,
    is_small,
)
from stethoscope.probes._handed_on import is_activation_of
from stethoscope.probes._naming import Column, Naming
from stethoscope.probes._passes import MAX_CALLS, replaying
from stethoscope.probes._select import as_patterns, named_modules, select
from stethoscope.probes._tape import Tape
from stethoscope.stats import measurable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.hooks import RemovableHandle

    from stethoscope.probes._activations import Activations


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
        self.layout: tuple[tuple[list[int], list[int], list[int]], list[Column]] = (([], [], []), [])


_MAX_TENSORS = 1 << (CALL - INDEX)


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
        self.last_returned, self.last_inherited = (
            False,
            False,
        )  # whether a module returned it; whether it was not read itself
        self.inputs = spec.inputs
        self.called: list[Site] = []
        self.stable: set[int] = set()  # codes of small tensors that were not changed in place before their pass ended
        self._tried: list[tuple[int, Tensor, int]] = []  # candidates for it, with the version that was read
        self._paths: dict[int, str] = {}
        modules, self.notes = named_modules(model, "Activations")
        chosen, unmatched = select(modules, as_patterns(spec.include), as_patterns(spec.exclude), "Activations")
        self.notes += unmatched
        observed = {id(module) for _, module in chosen}
        self._sites: list[tuple[Site, nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        for name, _, module in modules:
            if id(module) not in observed and next(module.children(), None) is None and name:
                continue
            site = Site(len(self._sites), name, id(module) in observed, _may_write_inputs(module))
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
                    self._handles.append(module.register_forward_pre_hook(Before(self, site), with_kwargs=True))
                self._handles.append(module.register_forward_hook(After(self, site, module), with_kwargs=True))
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

    def count(self, site: Site) -> None:
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
        known = value is self.last and version == self.last_version
        if here is None or not known or (self.last_inherited and code & OUTERMOST):
            small = version >= 0 and type(value) is Tensor and is_small(value)
            # what the model returns is read: it decides alone whether a step without a loss is bad
            followed = not small and not code & OUTERMOST and self.follow(value)
            real = value if small or followed else _countable(value)
            if real is None:  # before anything is changed: numbers of the last tensor count on its own device
                return
            if here is None or here.device != value.device:
                place = self._phase, value.device
                if here is not None:
                    self._catch_up(here)
                here = self.here = self._gathered.get(place) or self._gathered.setdefault(place, _Gathered(place[1]))
            if small and code in self.stable:
                here.pending.append((code, len(here.rows), value, version))
                self._add_row(here, NONE)
            elif not followed:
                if small:
                    self._tried.append((code, value, version))
                self._add_row(here, here.tape.write(real))
            self.last, self.last_version, self.last_returned = value, version, not code & INPUT
        here.codes.append(code)
        here.numbers.append(self.last_number)

    def _add_row(self, here: _Gathered, row: int) -> None:
        self.last_number, self.last_inherited = len(here.rows), False
        here.rows.append(row)

    def is_intact(self) -> bool:
        """Whether the last tensor still is what was read."""
        # inference tensors have no version
        return self.last is not None and self.last_version >= 0 and self.last._version == self.last_version  # noqa: SLF001

    def follow(self, value: Tensor) -> bool:
        """Whether a tensor has the flags of the last one, as an activation function of what a module returned."""
        if self.last_returned and self.is_intact() and is_activation_of(value, self.last):
            self.last, self.last_version, self.last_inherited = value, value._version, True  # noqa: SLF001
            return True
        return False

    def inherit(self, code: int, output: Tensor) -> None:
        """Take a module's flags, in and out, from the last tensor."""
        here = self.here
        assert here is not None
        here.codes += (code | INPUT, code)
        here.numbers += (self.last_number, self.last_number)
        self.last, self.last_version = output, output._version  # noqa: SLF001
        self.last_returned = self.last_inherited = True

    def add_weight(self, code: int, weight: Tensor) -> None:
        """Let what a module returns be as bad as its weight is."""
        here = self.here
        assert here is not None
        here.codes.append(code)
        here.numbers.append(len(here.rows))
        here.rows.append(here.tape.write(weight.detach()))

    def _read_container(self, code: int, value: object) -> None:
        for i, (path, x) in enumerate(tensors(value)):
            if i < _MAX_TENSORS and (x.is_floating_point() or x.is_complex()):
                at = code | i << INDEX
                if i and at & ~OUTERMOST not in self._paths:
                    self._paths[at & ~OUTERMOST] = f".{path}"
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

    def _lay_out(self, gathered: _Gathered) -> list[Column]:
        """Name the flags; the same every step until other tensors pass by."""
        plainly, masked = Naming(masked=False, sparse=True), Naming(masked=True, sparse=True)
        # one record stays although it is zero, so that silence and health differ; masked scores and log(0) are healthy
        returned = Naming(masked=True, sparse=False)
        for code, number in zip(gathered.codes, gathered.numbers, strict=True):
            row = gathered.rows[number]
            if row == NONE:
                continue
            module, call = self._sites[code >> SITE][0].name, code >> CALL & MAX_CALLS - 1
            side = "input_" if code & INPUT else ""
            suffix = self._paths.get(code & ~OUTERMOST, "")
            # a mask handed over beside the activations may hold -Inf and be healthy
            naming = masked if side and suffix else plainly
            naming.add(Key(f"activation/{side}nonfinite{suffix}", module, call), row)
            if code & OUTERMOST:
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
