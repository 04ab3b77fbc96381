"""What becomes of single units while the model trains: which are dead, constant, saturated, or given nothing to work on."""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stethoscope import stats
from stethoscope._protocols import Columns, Key, Readings
from stethoscope._tree import plain, tensors
from stethoscope.probes import _unit_stats as units
from stethoscope.probes._hook import Hook, is_traced, takes_hooks
from stethoscope.probes._passes import replaying

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe

_FUNCTIONS = {"TanhBackward0": "saturated", "SigmoidBackward0": "certain"}
"""Operations of autograd by which a functional activation is recognised, and what is said of it."""

_RANGE = ("low", "high", "spread")

_NARROW = 16
"""Units up to which a layer is one in which half of them may be dead by chance."""

HALF = 0.5
"""Dropout of which nothing is recorded below."""

IN_A_ROW = 3
"""Observed steps in which a unit must have been dead to count."""


@dataclass(frozen=True)
class Units:
    """Shares of dead, constant and saturated units, and what normalisations and attention heads are given.

    **Records**, in training only, of innermost modules whose output has a gradient, per module over all its calls in a step, from
    at most 65,536 values of the first items of the batch. A unit is a channel: axis 1 of convolutions, the last one of `Linear`.

    - `unit/dead_fraction`: units that were exactly zero in each of the last three observed steps. `unit/input_dead_fraction` says the same of
      what a `Linear` or convolution is given, unless a module has just returned it: that is where functional activations show.
    - `unit/constant_fraction`: units without any variation, of activations that are not flat anywhere by design (tanh, GELU, ...). Zeros do not
      count where other units are zero for some items too.
    - `unit/batch_spread`: largest difference between items of the batch, over the largest absolute value; 0 for a module that returns
      the same for each item, or one item for all of a batch for which the model returns as many. Left out where everything is zero.
    - `unit/levelled`: 1 where what a layer or normalisation is given differs between items, and what it returns does not (left out elsewhere).
    - `unit/open_fraction`: values of the last module that runs, a sigmoid, that exceed .99.
    - `unit/width`: units of a layer that has no more than 16 (left out elsewhere).
    - `unit/saturated_fraction`: units with 90 % of their values in the flat ends of a tanh (|y| > .99); `unit/certain_fraction`: the same of a
      sigmoid (y < .01, y > .99), and of a softmax the rows whose largest value exceeds .999. Left out of the last module that runs.
      Of a functional one right before a `Linear` or convolution: `unit/input_saturated_fraction`, `unit/input_certain_fraction`, of that module.
    - `unit/dropped_fraction`: what a dropout module is set to drop, where that is half or more.
    - `unit/starved_fraction`: groups that a normalisation gets with a variance below its own eps, though not all zero.
    - `unit/dead_heads`: attention heads that contribute less than a thousandth of the largest one.
    - `unit/headroom_bits`, `unit/floor_bits`, of float16: octaves from the largest absolute value to overflow, and down to the
      smallest normal number.

    **Cost:** on observed steps two or three reductions per module; nothing in between. Never waits for the device. Memory: a few
    numbers per unit.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> Units(every=10).covers(Units(every=10))
        True
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Choose the modules of `model`; they are hooked while armed."""
        return UnitHooks(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` looks no more often."""
        return isinstance(other, Units) and (self.every == other.every or self.every == 1)


class _Site:
    """One module, and what it has shown in this step."""

    __slots__ = ("axis", "heads", "leaf", "learns", "module", "name", "now", "quiet", "shape", "single")

    def __init__(self, name: str, module: nn.Module, heads: int) -> None:
        self.name, self.module, self.heads = name, module, heads
        self.leaf = next(module.children(), None) is None
        self.learns = next(module.parameters(recurse=False), None) is not None
        self.axis = -1
        self.shape: torch.Size | None = None
        self.single: Tensor | None = None  # what it has returned for the whole batch, if that is one item
        self.now: dict[str, Tensor] = {}
        self.quiet: dict[str, Tensor] = {}  # per unit, observed steps in a row in which it was dead


class UnitHooks:
    """The live hooks of one `Units`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failure: Exception | None = None
        self._thread = get_ident()
        self._armed, self._depth, self._active = False, 0, False
        self._items = 0  # of the batch that the model is given
        self._last: Tensor | None = None  # what the last module returned
        self._maker: _Site | None = None  # that module
        self._tail: _Site | None = None
        self._axes: dict[int, tuple[int, int]] = {}  # dimensions -> axis and size of the channels last seen
        self._order: dict[_Site, None] = {}
        self._outputs: set[_Site] = set()
        self._handles: list[RemovableHandle] = []
        parents = {id(child): parent for parent in model.modules() for child in parent.children()}
        self._sites = [
            _Site(plain(name), module, units.heads_into(plain(name), parents.get(id(module))))
            for name, module in model.named_modules()
            if takes_hooks(module)
        ]

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        if phase != "train":
            # hooks would run in this phase as well
            self._release()
            return
        self._armed = on and self.failure is None
        self._forget()
        if self._armed and not self._handles:
            for site in self._sites:
                self._handles.append(site.module.register_forward_pre_hook(_Before(self, site)))
                self._handles.append(site.module.register_forward_hook(_After(self, site)))
        elif not self._armed:
            self._release()

    def _forget(self) -> None:
        self._depth, self._last, self._maker, self._tail = 0, None, None, None
        for site in self._order:
            site.now.clear()
            site.single = None
        self._order.clear()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False
        self._forget()
        self._release()

    def before(self, site: _Site, args: tuple[object, ...]) -> None:
        """A module is about to run."""
        if get_ident() != self._thread:
            return
        if self._depth == 0 or site.name == "":
            self._depth, self._last = 0, None
            self._active = self.model.training and not replaying()
            self._items = units.items_of(args)
        self._depth += 1
        x = args[0] if args else None
        if not self._active or not site.leaf or not isinstance(x, Tensor):
            return
        with torch.no_grad():
            if x is self._last and self._maker is not None and "output spread" in self._maker.now:
                self._keep(site, "differs", units.differs(*(self._maker.now[f"output {each}"] for each in _RANGE)))
            if units.normalises(site.module):
                given = _readable(x, trained=False)
                if given is not None:
                    self._keep(site, "starved", units.starved(site.module, given))
                    if x is not self._last:
                        self._keep(site, "differs", units.differs(*units.ranges(given, -1)))
            elif isinstance(site.module, units.WEIGHTED) and (x is not self._last or site.heads):
                given = _readable(x, trained=True)
                if given is not None:
                    axis = units.channel_axis(site.module, given) or -1
                    self._range(site, "input", given, axis)
                    self._keep(site, "differs", units.differs(*(site.now[f"input {each}"] for each in _RANGE)))
                    made = _FUNCTIONS.get(x.grad_fn.name() if x.grad_fn is not None else "")
                    if made is not None:
                        self._keep(site, f"input {made}", units.flat_units(given, axis, signed=made == "saturated"))

    def after(self, site: _Site, output: object) -> None:
        """A module has run."""
        if get_ident() != self._thread:
            return
        self._depth = max(self._depth - 1, 0)
        if self._active and (site.leaf or isinstance(site.module, nn.MultiheadAttention)):
            self._order[site] = None
            self._tail = site
            _, x = next(tensors(output), ("", None))
            real = None if x is None else _readable(x, trained=True)
            site.single = None
            if x is not None and real is not None:
                with torch.no_grad():
                    self._read(site, x, real)
            elif x is not None and x.requires_grad and units.is_single(x, self._items):
                site.single = x.new_zeros(())
            self._last, self._maker = x, site
        if self._depth == 0:
            if self._active and self._tail is not None:
                self._outputs.add(self._tail)
                _, y = next(tensors(output), ("", None))
                if site.name or y is None or not y.dim() or len(y) != self._items:
                    for each in self._order:
                        each.single = None
            self._last = self._maker = self._tail = None

    def _read(self, site: _Site, x: Tensor, real: Tensor) -> None:
        axis = self._axis(site, real)
        self._range(site, "output", real, axis)
        flat = units.saturation(site.module, real, axis)
        if flat is not None:
            self._keep(site, "saturated", flat)
        if isinstance(site.module, nn.Sigmoid):
            self._keep(site, "open", (real > units.OPEN).to(real.dtype).mean())
        if isinstance(site.module, units.NOWHERE_FLAT):
            self._keep(site, "zeros", (real == 0).to(real.dtype).mean())
        if x.dtype is torch.float16:
            self._keep(site, "largest", real.abs().amax())
        if isinstance(site.module, units.DROPOUT) and site.module.training and site.module.p >= HALF:
            self._keep(site, "dropped", real.new_full((), site.module.p))

    def _axis(self, site: _Site, x: Tensor) -> int:
        axis = units.channel_axis(site.module, x)
        if axis is None:
            # an activation has the channels of what it follows
            known = self._axes.get(x.dim())
            axis = known[0] if known is not None and x.shape[known[0]] == known[1] else (1 if x.dim() > 3 else -1)
        self._axes[x.dim()] = axis, x.shape[axis]
        return axis

    def _range(self, site: _Site, which: str, x: Tensor, axis: int) -> None:
        low, high, spread = units.ranges(x, axis)
        before = site.now.get(f"{which} low")
        if before is not None and _alike(before, low):
            low, high = torch.minimum(before, low), torch.maximum(site.now[f"{which} high"], high)
            spread = torch.maximum(site.now[f"{which} spread"], spread)
        site.now.update({f"{which} low": low, f"{which} high": high, f"{which} spread": spread})
        self._order[site] = None

    def _keep(self, site: _Site, name: str, value: Tensor) -> None:
        before = site.now.get(name)
        # over several calls in a step the mildest: what one call escapes is not lost
        site.now[name] = torch.minimum(before, value) if before is not None and _alike(before, value) else value
        self._order[site] = None

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        found: dict[tuple[torch.device, torch.dtype, bool], tuple[list[Key], list[Tensor]]] = {}
        with torch.no_grad():
            for site in self._order:
                for name, value in self._finish(site):
                    keys, values = found.setdefault((value.device, value.dtype, name == "levelled"), ([], []))
                    keys.append(Key(f"unit/{name}", site.name))
                    values.append(value)
            columns = [
                Columns(keys, torch.stack(values), range(len(keys)), sparse=sparse)
                for (_, _, sparse), (keys, values) in found.items()
            ]
        self._forget()
        return Readings(columns)

    def _finish(self, site: _Site) -> list[tuple[str, Tensor]]:
        now, found = site.now, list[tuple[str, Tensor]]()
        for which, prefix in (("output", ""), ("input", "input_")):
            if f"{which} low" not in now:
                continue
            low, high = now[f"{which} low"], now[f"{which} high"]
            dead = (low == 0) & (high == 0)
            quiet = site.quiet.get(which)
            quiet = (quiet + 1) * dead if quiet is not None and _alike(quiet, dead) else dead.int()
            site.quiet[which] = quiet
            if which == "input" or not isinstance(site.module, units.PASSING_ON):
                if len(dead) <= _NARROW:
                    found.append((f"{prefix}width", low.new_full((), float(len(dead)))))
                found.append((f"{prefix}dead_fraction", (quiet >= IN_A_ROW).to(low.dtype).mean()))
            if which == "input":
                if site.heads and len(low) % site.heads == 0:
                    found.append(("dead_heads", units.dead((high - low).view(site.heads, -1).amax(1))))
                continue
            largest = torch.maximum(low.abs(), high.abs()).amax()
            # NaN, which no threshold meets, where all is zero: such a module has nothing to be constant in
            spread = now["output spread"] / largest
            found.append(("batch_spread", spread))
            if "differs" in now and (site.learns or units.normalises(site.module)):
                found.append(
                    ("levelled", ((now["differs"] > units.DIFFERENT) & (spread <= units.SAME)).to(spread.dtype))
                )
            if isinstance(site.module, units.NOWHERE_FLAT):
                still = high - low <= 1e-6 * largest
                # zeros elsewhere as well: only some units are kept per item, which is sparsity on purpose
                sparse = now["zeros"] > dead.to(low.dtype).mean() + 0.01
                found.append(("constant_fraction", (still & ~(dead & sparse)).to(low.dtype).mean()))
        if site.single is not None:
            found.append(("batch_spread", site.single))
        if "open" in now and site in self._outputs:
            found.append(("open_fraction", now["open"]))
        if "saturated" in now and site not in self._outputs:
            kind = "saturated" if isinstance(site.module, nn.Tanh) else "certain"
            found.append((f"{kind}_fraction", now["saturated"]))
        found += [
            (f"input_{made}_fraction", now[f"input {made}"]) for made in _FUNCTIONS.values() if f"input {made}" in now
        ]
        found += [(f"{name}_fraction", now[name]) for name in ("starved", "dropped") if name in now]
        if "largest" in now:
            limits = torch.finfo(torch.float16)
            found.append(("headroom_bits", (limits.max / now["largest"]).log2()))
            found.append(("floor_bits", (now["largest"] / limits.tiny).log2()))
        if isinstance(site.module, nn.MultiheadAttention):
            strength = units.head_strength(site.module)
            if strength is not None:
                found.append(("dead_heads", units.dead(strength)))
        return found


def _alike(before: Tensor, now: Tensor) -> bool:
    """Whether they can be compared: a model may be moved to another device while it is observed."""
    return before.shape == now.shape and before.device == now.device


def _readable(x: Tensor, *, trained: bool) -> Tensor | None:
    """The first items of what can be measured: at least two items; where `trained`, only what a gradient flows through."""
    if (
        x.is_nested
        or not x.is_floating_point()
        or x.dim() < 2
        or x.shape[0] < 2
        or not x.numel()
        or (trained and not x.requires_grad)
    ):
        return None
    items = max(2, units.VALUES * x.shape[0] // x.numel())
    return stats.measurable(x.detach()[:items])


class _Before(Hook):
    __slots__ = ("attached", "site")

    def __init__(self, attached: UnitHooks, site: _Site) -> None:
        self.attached, self.site = attached, site

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if is_traced() or self.attached.failure is not None:
            return
        try:
            self.attached.before(self.site, args)
        except Exception as error:  # instrumentation never stops a training
            self.attached.failure = error


class _After(Hook):
    __slots__ = ("attached", "site")

    def __init__(self, attached: UnitHooks, site: _Site) -> None:
        self.attached, self.site = attached, site

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if is_traced() or self.attached.failure is not None:
            return
        try:
            self.attached.after(self.site, output)
        except Exception as error:
            self.attached.failure = error
