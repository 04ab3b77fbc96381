"""The path of `Activations` for statistics: hooks write into the rows of a bank, and name them when it is read."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from stethoscope import stats
from stethoscope._protocols import Columns, Key, Readings
from stethoscope._record import Finding
from stethoscope._tree import tensors
from stethoscope.probes._bank import Bank
from stethoscope.probes._compiled import Eagerly
from stethoscope.probes._hook import Hook, is_traced
from stethoscope.probes._passes import MAX_CALLS, replaying
from stethoscope.probes._select import as_patterns, named_modules, select

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.hooks import RemovableHandle

    from stethoscope.probes._activations import Activations


class _Slot:
    """One tensor of one call of one module: its keys, and the row that holds its numbers or the slot it repeats."""

    __slots__ = ("bank", "call", "masked", "module", "name", "repeats", "row", "seen", "touched")

    def __init__(self, name: str, module: str, call: int, masked: bool) -> None:
        self.name, self.module, self.call, self.masked = name, module, call, masked
        self.bank: Bank | None = None
        self.row = -1
        self.repeats: _Slot | None = None
        self.seen = -1  # the last pass that touched it
        self.touched = False  # since the last read


_Place: TypeAlias = "tuple[_Slot, bool, Bank, int]"
"""Where a slot's numbers are, and whether it is what the model returned. Plain tuples, since there is one per tensor and step."""


class _Phase:
    """What one phase has gathered since it was last read."""

    def __init__(self) -> None:
        self.banks: dict[tuple[torch.device, torch.dtype], Bank] = {}
        self.slots: dict[tuple[int, int, bool, int], _Slot] = {}
        self.order: list[_Slot] = []
        self.outermost: set[_Slot] = set()
        self.layout: tuple[list[_Place], list[_Block]] = ([], [])


class _Block(NamedTuple):
    """A run of keys over one bank's finished scalars or histograms."""

    bank: Bank
    histogram: bool
    sparse: bool
    keys: list[Key]
    rows: list[int]


class _Site:
    """One hooked module."""

    __slots__ = ("calls", "index", "name", "observed", "root", "running")

    def __init__(self, index: int, name: str, observed: bool) -> None:
        self.index, self.name, self.observed, self.root = index, name, observed, name == ""
        self.calls = 0
        self.running: list[int] = []


class ActivationHooks:
    """The live hooks of one `Activations`."""

    def __init__(self, spec: Activations, model: nn.Module) -> None:
        self.spec, self.model = spec, model
        self.armed = False
        self.failure: Exception | None = None
        self.foreign_calls = 0
        self._thread = get_ident()
        self._eagerly = Eagerly("Activations")
        self._phase_name, self._phases = "train", dict[str, _Phase]()
        self._phase = self._phases.setdefault("train", _Phase())
        self._depth, self._active, self._pass = 0, False, 0
        self._called: list[_Site] = []
        self._last: tuple[Tensor, int, _Slot] | None = None
        self._unreadable: set[str] = set()
        self._refused: dict[str, list[str]] = {}  # kind of tensor to modules, since the last reading
        self._names = [name for name in spec.statistics if name != "histogram"]
        modules, self.notes = named_modules(model, "Activations")
        chosen, unmatched = select(modules, as_patterns(spec.include), as_patterns(spec.exclude), "Activations")
        self.notes += unmatched
        observed = {id(module) for _, module in chosen}
        self._sites: list[tuple[_Site, nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        for name, _, module in modules:
            # modules with children are hooked even when they are not observed: they tell where a pass begins
            if id(module) in observed or next(module.children(), None) is not None or name == "":
                self._sites.append((_Site(len(self._sites), name, id(module) in observed), module))

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        on = on and (self.spec.phases is None or phase in self.spec.phases) and self.failure is None
        self.armed, self._phase_name = on, phase
        self._phase = self._phases.setdefault(phase, _Phase())
        self._depth, self._last = 0, None
        self._eagerly.set(on, self.spec.phases, phase)
        if on and not self._handles:
            # even an empty hook costs a small module several percent, so there are none on steps in between
            for site, module in self._sites:
                self._handles.append(module.register_forward_pre_hook(_Before(self, site), with_kwargs=True))
                self._handles.append(module.register_forward_hook(_After(self, site)))
        elif not on:
            self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def detach(self) -> None:
        """See `Attachment`."""
        self.armed = False
        self._eagerly.release()
        self._release()
        self._phases.clear()
        self._phase = _Phase()
        self._last = None

    # -- in the hooks ------------------------------------------------------------------------------------------------

    def before(self, site: _Site, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A module is about to run."""
        if get_ident() != self._thread:
            self.foreign_calls += 1
            return
        if site.root or self._depth == 0:
            self._begin()
        self._depth += 1
        if not self._active:
            return
        if site.calls == 0:
            self._called.append(site)
        call = min(site.calls, MAX_CALLS - 1)
        site.calls += 1
        site.running.append(call)
        if site.observed and self.spec.inputs:
            value: object = args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())
            self._read(site, call, value, "input_", is_input=True)

    def after(self, site: _Site, output: object) -> None:
        """A module has run."""
        if get_ident() != self._thread:
            return
        self._depth = max(self._depth - 1, 0)
        if not self._active or not site.running:
            return
        call = site.running.pop()
        if site.observed:
            self._read(site, call, output, "", is_input=False)
        if self._depth == 0:
            self._last = None

    def _begin(self) -> None:
        """An outermost call begins: a new micro-batch, or no training at all."""
        self._depth, self._last = 0, None
        for site in self._called:
            site.calls = 0
            site.running.clear()
        self._called.clear()
        self._pass += 1
        self._active = (self._phase_name != "train" or self.model.training) and not replaying()

    def _read(self, site: _Site, call: int, value: object, prefix: str, *, is_input: bool) -> None:
        phase, outermost = self._phase, not is_input and self._depth == 0
        found = (("", value),) if type(value) is Tensor else tuple(tensors(value))
        for i, (path, x) in enumerate(found):
            if i and not (x.is_floating_point() or x.is_complex()):
                continue
            slot = phase.slots.get((site.index, call, is_input, i))
            if slot is None:
                suffix = f".{path}" if i and path else ""
                slot = _Slot(f"{prefix}{{}}{suffix}", site.name, call, masked=is_input and i > 0)
                phase.slots[site.index, call, is_input, i] = slot
            if not slot.touched:
                phase.order.append(slot)
            if outermost:
                phase.outermost.add(slot)
            version = -1 if x.is_inference() else x._version  # noqa: SLF001  # the only way to see changes in place
            last = self._last
            if last is not None and last[0] is x and last[1] == version:
                self._repeat(slot, last[2])
            else:
                self._write(slot, x)
            slot.touched, slot.seen = True, self._pass
            holder = slot.repeats or slot
            if i == 0 and holder.bank is not None:
                self._last = (x, version, holder)

    def _repeat(self, slot: _Slot, holder: _Slot) -> None:
        """The very tensor that was just read is seen again, as the next module's input or its container's output."""
        if not slot.touched:
            slot.repeats = holder
        elif slot.repeats is not holder and self._last is not None:
            self._write(slot, self._last[0])

    def _part(self, slot: _Slot) -> None:
        """A slot that repeated another in earlier micro-batches of this step needs its own row from here on."""
        source, slot.repeats = slot.repeats, None
        if source is None or source.bank is None:
            return
        if source.seen != self._pass:
            source.bank.fold()
        if slot.bank is not source.bank:
            slot.bank, slot.row = source.bank, source.bank.add()
        slot.bank.copy_gathered(source.row, slot.row)

    def _write(self, slot: _Slot, x: Tensor) -> None:
        if slot.touched:
            self._part(slot)
        else:
            slot.repeats = None
        grad = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)  # noqa: SLF001  # what torch.no_grad() calls, without its 2 us
            real = stats.measurable(x)
            if real is None:
                self._refuse(slot, x)
                return
            if real.numel() == 0:
                return
            bank = slot.bank
            if bank is None or bank.device != real.device or bank.dtype is not real.dtype:
                bank = self._phase.banks.get((real.device, real.dtype))
                if bank is None:
                    bank = Bank(real.device, real.dtype, frozenset(self.spec.statistics), self.spec.sample)
                    self._phase.banks[real.device, real.dtype] = bank
                slot.bank, slot.row = bank, bank.add()
            elif slot.seen != self._pass:
                bank.make_room(slot.row)
            bank.write(slot.row, real)
        finally:
            torch._C._set_grad_enabled(grad)  # noqa: SLF001

    def _refuse(self, slot: _Slot, x: Tensor) -> None:
        if slot.module not in self._unreadable:
            self._unreadable.add(slot.module)
            kind = "nested" if x.is_nested else "quantised" if x.is_quantized else str(x.layout)
            self._refused.setdefault(kind, []).append(slot.module)

    def _note_refused(self) -> None:
        for kind, modules in self._refused.items():
            named = ", ".join(map(repr, modules[:3])) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
            self.notes.append(
                Finding(
                    "probe-read-nothing",
                    "info",
                    f"Activations: a {kind} tensor has no elements to measure; seen in {named}.",
                    "Observe a module before or after.",
                    module=modules[0],
                    evidence={"probe": "Activations", "kind": kind, "modules": list(modules)},
                )
            )
        self._refused.clear()

    # -- at the end of a step ------------------------------------------------------------------------------------

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        self.notes += self._eagerly.notes()
        self._note_refused()
        phase = self._phase
        for bank in phase.banks.values():
            bank.fold()
        places: list[_Place] = []
        for slot in phase.order:
            holder = slot.repeats or slot
            if holder.bank is not None:
                places.append((slot, slot in phase.outermost, holder.bank, holder.row))
        if phase.layout[0] != places:
            phase.layout = (places, self._lay_out(places))
        scalars = {bank: bank.scalars(self._columns()).view(-1) for bank in phase.banks.values() if self._names}
        columns = [
            Columns(keys, bank.histograms() if histogram else scalars[bank], rows, sparse)
            for bank, histogram, sparse, keys, rows in phase.layout[1]
        ]
        for bank in phase.banks.values():
            bank.clear()
        for slot in phase.order:
            slot.touched = False
        phase.order.clear()
        phase.outermost.clear()
        self._last = None
        return Readings(columns)

    def _columns(self) -> list[str]:
        return [*self._names, "nonfinite_masked"] if "nonfinite" in self._names else self._names

    def _lay_out(self, places: list[_Place]) -> list[_Block]:
        """Work out which key names which number; the same every step until other tensors pass by."""
        blocks: list[_Block] = []

        def add(bank: Bank, key: Key, row: int, *, histogram: bool = False, sparse: bool = False) -> None:
            for block in reversed(blocks):
                if block.bank is not bank:
                    break
                if block.histogram is histogram and block.sparse is sparse:
                    block.keys.append(key)
                    block.rows.append(row)
                    return
            blocks.append(_Block(bank, histogram, sparse, [key], [row]))

        width = len(self._columns())
        for slot, outermost, bank, row in places:
            for column, name in enumerate(self._names):
                flag, masked_at = name == "nonfinite", row * width + width - 1
                # a mask handed over beside the activations may hold -Inf and be healthy
                at = masked_at if flag and slot.masked else row * width + column
                key = Key(f"activation/{slot.name.format(name)}", slot.module, slot.call)
                add(bank, key, at, sparse=flag)
                if flag and outermost:
                    # one record stays although it is zero, so that silence and health differ; masked scores and
                    # log(0) are healthy
                    key = Key(f"activation/{slot.name.format('outermost_nonfinite')}", slot.module, slot.call)
                    add(bank, key, masked_at)
        if "histogram" in self.spec.statistics:
            for slot, _, bank, row in places:
                key = Key(f"activation/{slot.name.format('histogram')}", slot.module, slot.call, stats.HISTOGRAM_EDGES)
                add(bank, key, row, histogram=True)
        return blocks


class _Before(Hook):
    __slots__ = ("attached", "site")

    def __init__(self, attached: ActivationHooks, site: _Site) -> None:
        self.attached, self.site = attached, site

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object] | None = None) -> None:
        if is_traced() or not self.attached.armed or kwargs is None:
            return
        try:
            self.attached.before(self.site, args, kwargs)
        except Exception as error:  # instrumentation never stops a training
            self.attached.armed, self.attached.failure = False, error


class _After(Hook):
    __slots__ = ("attached", "site")

    def __init__(self, attached: ActivationHooks, site: _Site) -> None:
        self.attached, self.site = attached, site

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if is_traced() or not self.attached.armed:
            return
        try:
            self.attached.after(self.site, output)
        except Exception as error:
            self.attached.armed, self.attached.failure = False, error
