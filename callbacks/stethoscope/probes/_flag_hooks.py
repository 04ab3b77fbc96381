"""The hooks of flags: around each module, they hand over what passes by."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _is_tracing  # called at each call of each module: no function of ours around it
from torch._C import _set_grad_enabled as set_grad_enabled  # what torch.no_grad() calls, without its 2 us
from torch.compiler import is_compiling

from stethoscope.probes._handed_on import factor_of, is_exact, is_finite, is_tame, is_untouched
from stethoscope.probes._hook import Hook
from stethoscope.probes._passes import MAX_CALLS
from stethoscope.probes._tape import SMALL

if TYPE_CHECKING:
    from stethoscope.probes._flags import FlagHooks

INPUT, OUTERMOST = 1, 2
INDEX, CALL, SITE = 2, 8, 12
"""Bits of a code: input or output, outermost or not, six for the tensor, four for the call, the rest for the module."""
NONE = -1
"""A row that is not there yet."""
_GONE = object()
"""Instead of an output: what a hook is called with that has been removed meanwhile."""


class Site:
    """One hooked module, and what it has passed on in the pass under way."""

    __slots__ = ("calls", "enters", "index", "name", "observed", "root")

    def __init__(self, index: int, name: str, observed: bool, enters: bool) -> None:
        self.index, self.name, self.observed, self.root = index, name, observed, name == ""
        self.enters = enters  # whether it has a pre-hook
        self.calls = 0


def is_small(x: Tensor) -> bool:
    """Whether a call costs more than to read a tensor of this size."""
    return x.dtype is torch.float32 and 0 < x.numel() <= SMALL and x.layout is torch.strided and not x.is_nested


def _given(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    return args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())


class Before(Hook):
    __slots__ = ("attached", "site")

    def __init__(self, attached: FlagHooks, site: Site) -> None:
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
                    attached.read_value(site.index << SITE | call << CALL | INPUT, _given(args, kwargs))
        except Exception as error:  # instrumentation never stops a training
            attached.armed, attached.failure = False, error


class After(Hook):
    __slots__ = ("attached", "code", "enters", "exact", "factor", "hands_on", "site")

    def __init__(self, attached: FlagHooks, site: Site, module: nn.Module) -> None:
        self.attached, self.site = attached, site
        self.code, self.enters = site.index << SITE, site.enters
        self.exact = is_exact(module)
        self.factor = factor_of(module)
        self.hands_on = (self.exact or is_finite(module)) and not site.enters

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object = _GONE
    ) -> None:
        attached = self.attached
        if is_compiling() or not attached.armed or get_ident() != attached.thread or _is_tracing() or output is _GONE:
            return
        try:
            if self.hands_on and self._hand_on(module, args, kwargs, output):
                return
            if self.code not in attached.stable or not self._put_off(args, kwargs, output):
                grad = is_grad_enabled()
                set_grad_enabled(False)
                try:
                    self._read(args, kwargs, output)
                finally:
                    set_grad_enabled(grad)
        except Exception as error:  # instrumentation never stops a training
            attached.armed, attached.failure = False, error

    def _hand_on(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> bool:
        """Whether the output's flags are those of the input, which were taken last: nothing is read then.

        Of what is not finite already an activation function may make finite values: taken as passed on, behind a module that
        is to be told about anyway.
        """
        attached, site, last = self.attached, self.site, self.attached.last
        if type(output) is not Tensor or output.numel() <= SMALL:  # as cheap to read
            return False
        if kwargs or len(args) != 1 or last is None or not (self.exact or attached.last_returned):
            return False
        if not (attached.depth and attached.inputs and is_untouched(module, output)):
            return False
        if self.factor and not is_tame(getattr(module, self.factor)):
            return False
        if args[0] is not last:
            if not (type(args[0]) is Tensor and attached.follow(args[0])):
                return False
        elif not attached.is_intact():
            return False
        code = self.code | min(site.calls, MAX_CALLS - 1) << CALL
        attached.inherit(code, output)
        if type(module) is nn.PReLU:
            attached.add_weight(code, module.weight)
        attached.count(site)
        return True

    def _put_off(self, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> bool:
        """Whether this is a small module's first call in a pass, given what was just read: `_read` takes four times as long."""
        attached, site, here, last = self.attached, self.site, self.attached.here, self.attached.last
        if self.enters or site.calls or not (attached.depth and here and last is not None and attached.inputs):
            return False
        if kwargs or len(args) != 1 or args[0] is not last or type(output) is not Tensor or not is_small(output):
            return False
        try:
            version = output._version  # noqa: SLF001  # the only way to see changes in place
            if last._version != attached.last_version or output.get_device() != here.index:  # noqa: SLF001
                return False
        except RuntimeError:  # inference tensors have no version
            return False
        number = len(here.rows)
        here.codes += (self.code | INPUT, self.code)
        here.numbers += (attached.last_number, number)
        here.rows.append(NONE)
        here.pending.append((self.code, number, output, version))
        attached.last, attached.last_version, attached.last_number = output, version, number
        attached.last_returned, attached.last_inherited = True, False
        attached.called.append(site)
        site.calls = 1
        return True

    def _read(self, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        attached, site = self.attached, self.site
        if self.enters:
            attached.depth -= 1
            if attached.active and site.observed:
                code = self.code | min(site.calls - 1, MAX_CALLS - 1) << CALL
                attached.read_value(code if attached.depth else code | OUTERMOST, output)
            if attached.depth == 0:
                attached.end()
            return
        if attached.depth == 0:
            attached.begin()
        if attached.active:
            code = self.code | min(site.calls, MAX_CALLS - 1) << CALL
            attached.count(site)
            if attached.inputs:
                attached.read_value(code | INPUT, args[0] if len(args) == 1 and not kwargs else _given(args, kwargs))
            attached.read_value(code if attached.depth else code | OUTERMOST, output)
