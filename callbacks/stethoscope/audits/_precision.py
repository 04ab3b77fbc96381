"""The same input in two precisions: where do the digits go, and how far is the next overflow?"""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope._record import Finding, Report
from stethoscope._tree import plain, tensors, unwrap
from stethoscope.audits._nonfinite import nonfinite
from stethoscope.audits._nonfinite_tensor import absmax, headroom_bits, values
from stethoscope.audits._precision_norms import flat_share, nearly_constant
from stethoscope.audits._precision_sweep import finite_range, sweep
from stethoscope.audits._untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_RANDOM = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase, nn.RReLU)  # noqa: SLF001 - all of nn.Dropout
"""Modules that draw random numbers in train mode, which differ from dtype to dtype."""


class ModuleError(NamedTuple):
    """One call of a module in both precisions.

    Args:
        module: its name.
        call_index: which call of it, from 0.
        error_in: 2-norm of the difference of its inputs over the norm of the reference's; 0 without inputs.
        error: the same for what it returns; Inf where only the tested side is not finite.
        absmax: largest magnitude that the reference returns.
        headroom_bits: log2 of the tested dtype's largest number over `absmax`, in bits.
        underflow: fraction in [0, 1] of the reference's non-zero values that are zero in the tested dtype.
    """

    module: str
    call_index: int
    error_in: float
    error: float
    absmax: float
    headroom_bits: float
    underflow: float


@dataclass(frozen=True, kw_only=True)
class PrecisionReport(Report):
    """What `audits.precision` returns.

    Args:
        module: where half of the digits are lost: of all steps up to there, the one with the largest jump of the error;
            None if no error exceeds `tolerance`.
        tolerance: square root of the tested dtype's epsilon: half of its digits.
        modules: every call, in the order in which calls end.
        finite_rms: lowest and highest of the tried root mean squares of the input, around that of the input, that give a
            finite output; None without a float tensor among the arguments.
        sweep: whether the output is finite for `silence`, `ones` and each root mean square from `1e-06` to `1000`.
    """

    module: str | None = None
    tolerance: float = 0.0
    modules: tuple[ModuleError, ...] = ()
    finite_rms: tuple[float, float] | None = None
    sweep: Mapping[str, bool] = field(default_factory=dict[str, bool])


def precision(
    model: nn.Module,
    *args: Any,
    reference: str | torch.dtype | torch.device | nn.Module = "float64",
    mode: Literal["eval", "train"] = "eval",
    **kwargs: Any,
) -> PrecisionReport:
    """Compare the model as it is, in its dtype and under the autocast around this call, with a more exact run.

    Both run with the same random state and without dropout, which draws differently in each dtype. An error is relative: the
    2-norm of the difference over the norm of the reference. Trouble to come shows before there is any Inf: as few bits of headroom,
    and as a normalisation whose input varies less than its eps. What is not finite already is explained as by `nonfinite`.

    The model is put back as it was. Cost: one pass of each side, a copy of the model, of its activations and in float64, and
    twelve passes for the levels. Waits for the device.

    Args:
        model: any module that can be copied, unless `reference` is a model.
        *args: positional arguments of the forward pass.
        reference: a dtype or its name; a device or its name, such as `"cpu"` for a model on an accelerator, where a copy runs in the
            model's own dtype; or a model with modules of the same names, run as it is.
        mode: `"train"` takes BatchNorm's statistics from the batch, as in training; dropout modules stay off, dropout by function
            does not and shows as an error.
        **kwargs: keyword arguments of the forward pass.

    Raises:
        TypeError: `model` is no module.
        ValueError: an unknown dtype or mode, a device that this machine lacks or that the model is on, a model that cannot be copied.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     report = precision(model, torch.randn(3, 4))
        >>> report.modules[0].module, report.modules[0].error < 0.02
        ('0', True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got an object of {type(model).__name__}.")
    model = unwrap(model)
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}.")
    other, dtype, device = _reference(model, reference)
    exact = _Calls({plain(name): module for name, module in other.named_modules()})
    _pass(other, _cast(args, dtype, device), _cast(kwargs, dtype, device), exact.keep, mode=mode, exact=True)
    errors = _Errors(exact)
    _pass(model, _cast(args), _cast(kwargs), errors.compare, mode=mode, exact=False)
    tolerance = errors.epsilon**0.5
    lost = next((i for i, step in enumerate(errors.steps) if step[1] > tolerance), None)
    module = None
    if lost is not None:
        module = max(errors.steps[: lost + 1], key=lambda step: step[2])[0]
    born: tuple[Finding, ...] = ()
    if errors.spoilt:
        with untouched(model.forward):
            model.train(mode == "train")
            born = nonfinite(model, *args, **kwargs).findings
    lost_digits = [replace(each, cause=born[0].code if born else "") for each in _loss(module, tolerance, errors)]
    findings = [*born, *lost_digits, *_little_headroom(errors.modules), *exact.nearly_constant()]
    swept = sweep(model, args, kwargs)
    table = [
        f"{m.error:8.1e}  {m.headroom_bits:6.1f} bits  {m.underflow:5.1%}  {m.module or '(root)'}"
        for m in errors.modules
    ]
    return PrecisionReport(
        title=f"precision of {type(model).__name__}",
        summary="\n".join([" error    headroom   underflow  module", *table[:200], *_told(swept)]),
        findings=tuple(findings),
        module=module,
        tolerance=tolerance,
        modules=tuple(errors.modules),
        finite_rms=finite_range(swept, _rms(args, kwargs)),
        sweep=swept,
    )


def _rms(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    floats = [each for _, each in tensors((args, kwargs), depth=8) if each.is_floating_point() and each.numel()]
    return float(floats[0].detach().double().square().mean().sqrt()) if floats else 0.0


def _told(swept: Mapping[str, bool]) -> list[str]:
    bad = [name if name in ("silence", "ones") else f"rms {name}" for name, finite in swept.items() if not finite]
    if not swept:
        return []
    return [f"Not finite for input of {', '.join(bad)}." if bad else "Finite for silence, ones and all levels tried."]


class _Calls:
    """What the reference took and returned."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.kept: dict[tuple[str, int, bool], list[Tensor]] = {}
        self._modules = modules
        self._flat: dict[str, float] = {}

    def keep(self, name: str, parent: str, call: int, value: Any, *, entering: bool) -> None:
        found = self.kept[name, call, entering] = _floats(value)
        if entering and found:
            share = flat_share(self._modules[name], found[0])
            if share is not None:
                self._flat[name] = max(share, self._flat.get(name, 0.0))

    def nearly_constant(self) -> list[Finding]:
        eps = {name: float(getattr(self._modules[name], "eps", 0.0)) for name in self._flat}
        return nearly_constant(self._flat, eps)


class _Errors:
    """How the tested run differs, in time order."""

    def __init__(self, exact: _Calls) -> None:
        self.modules: list[ModuleError] = []
        self.steps: list[tuple[str, float, float]] = []  # module to blame, error, jump over the largest error before
        self.epsilon = 0.0
        self.spoilt = False
        """Whether the model returned NaN, or Inf where the reference does not."""
        self._exact, self._entered, self._highest = exact.kept, dict[tuple[str, int], float](), 0.0

    def compare(self, name: str, parent: str, call: int, value: Any, *, entering: bool) -> None:
        expected, found = self._exact.get((name, call, entering)), _floats(value)
        if not expected or [each.shape for each in expected] != [each.shape for each in found]:
            return
        error = _distance(found, expected)
        kinds = [each.dtype for each in found]
        self.epsilon = max(self.epsilon, *(torch.finfo(each).eps for each in kinds))
        # what a module is given too inexact was spoilt by the module around it
        self.steps.append((parent if entering else name, error, error / max(self._highest, self.epsilon)))
        self._highest = max(self._highest, error if math.isfinite(error) else 0.0)
        if entering:
            self._entered[name, call] = error
            return
        if not name:
            self.spoilt |= math.isinf(error) or any(bool(each.isnan().any()) for each in found)
        kind = min(kinds, key=lambda each: torch.finfo(each).max)
        top = absmax(iter(expected)) or 0.0
        least = torch.finfo(kind).smallest_normal * torch.finfo(kind).eps / 2
        sizes = torch.cat([values(each).abs().flatten().double() for each in expected])
        under = float(((sizes > 0) & (sizes < least)).double().mean()) if sizes.numel() else 0.0
        self.modules.append(
            ModuleError(name, call, self._entered.get((name, call), 0.0), error, top, headroom_bits(top, kind), under)
        )


def _pass(model: nn.Module, args: Any, kwargs: Any, see: Callable[..., None], *, mode: str, exact: bool) -> None:
    """Run once, without dropout, and show what every module takes and returns."""
    running: list[tuple[str, int]] = []
    calls: dict[str, int] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, named: Any) -> None:
            calls[name] = calls.get(name, -1) + 1
            see(name, running[-1][0] if running else "", calls[name], (given, named), entering=True)
            running.append((name, calls[name]))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, _given: Any, output: Any) -> None:
            call = running.pop()[1]
            see(name, running[-1][0] if running else "", call, output, entering=False)

        return hook

    with ExitStack() as stack:
        stack.enter_context(untouched(model.forward))
        model.train(mode == "train")
        for module in model.modules():
            if isinstance(module, _RANDOM):
                module.eval()
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(plain(name)), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(plain(name))).remove)
        if exact:
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
        model(*args, **kwargs)


def _reference(
    model: nn.Module, reference: str | torch.dtype | torch.device | nn.Module
) -> tuple[nn.Module, torch.dtype | None, torch.device | None]:
    if isinstance(reference, nn.Module):
        return unwrap(reference), None, None
    dtype = getattr(torch, reference, None) if isinstance(reference, str) else reference
    device = _device(model, reference)
    if device is None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"reference must be a floating dtype, its name such as 'float64', a device such as 'cpu', or a module; got {reference!r}."
        )
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    try:
        return copy.deepcopy(model).to(device=device, dtype=dtype), dtype, device
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}); give a model as the reference, e.g. a second one in float64."
        ) from error


def _device(model: nn.Module, reference: Any) -> torch.device | None:
    """Return the device that is meant, if one is."""
    try:
        device = torch.device(reference)
    except (RuntimeError, TypeError):
        return None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = {"cpu", *([accelerator.type] if accelerator else [])}
    if device.type not in here:
        raise ValueError(
            f"reference={reference!r}: this machine has no {device.type} device, only {sorted(here)}. Run the audit where there is "
            "one, or compare with a dtype: reference='float64'."
        )
    own = next((each.device for each in model.parameters()), torch.device("cpu"))
    if own.type == device.type:
        raise ValueError(f"reference={reference!r}: the model is on {own} already, so there is nothing to compare.")
    return device


def _cast(value: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().clone().to(device=device)
        return value.to(dtype) if dtype and value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(each, dtype, device) for each in value)
    return {key: _cast(each, dtype, device) for key, each in value.items()} if type(value) is dict else value


def _floats(value: Any) -> list[Tensor]:
    found = [values(each).clone() for _, each in tensors(value, depth=8)]
    found = [torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in found]
    return [each for each in found if each.is_floating_point() and each.numel()]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the relative error; equal infinities are no error, e.g. in masks."""
    difference = scale = 0.0
    for left, right in zip(found, expected, strict=True):
        a, b = left.double(), right.double().to(left.device)
        both = torch.isfinite(a) & torch.isfinite(b)
        if bool((~torch.isfinite(a) & torch.isfinite(b)).any()):
            return math.inf
        difference += float((a - b)[both].square().sum())
        scale += float(b[both].square().sum())
    return (difference / scale) ** 0.5 if scale else (math.inf if difference else 0.0)


def _loss(module: str | None, tolerance: float, errors: _Errors) -> list[Finding]:
    if module is None:
        return []
    of_it = [each for each in errors.modules if each.module == module]
    worst = max((each.error for each in of_it), default=math.inf)
    own = of_it[0] if of_it else None
    became = "not finite where the reference is" if math.isinf(worst) else f"off by {worst:.2g} of its norm"
    return [
        Finding(
            "precision-loss",
            "error" if math.isinf(worst) else "warning",
            f"What {repr(module) if module else 'the model'} returns is {became}; inputs were off by {own.error_in if own else 0:.2g}. Half of the "
            f"dtype's digits are lost from an error of {tolerance:.2g}.",
            "Run this module in float32: torch.autocast(device_type, enabled=False) around it; look for differences of nearly "
            "equal numbers, sums over many, and tiny variances.",
            module=module,
            evidence={"error": str(worst), "error_in": str(own.error_in if own else None), "tolerance": tolerance},
        )
    ]


def _little_headroom(modules: Sequence[ModuleError]) -> list[Finding]:
    tight = [each for each in modules if each.headroom_bits < 1 and math.isfinite(each.error)]
    if not tight:
        return []
    least = min(tight, key=lambda each: each.headroom_bits)
    return [
        Finding(
            "precision-headroom",
            "warning",
            f"{repr(least.module) if least.module else 'The model'} reaches {least.absmax:.3g}: {least.headroom_bits:.1f} bits below overflow"
            f"{f', and {len(tight) - 1} more calls are as close' if len(tight) > 1 else ''}.",
            "An input twice as large gives Inf: bfloat16 has the range of float32; or scale before this module.",
            module=least.module,
            evidence={"headroom_bits": round(least.headroom_bits, 2), "absmax": least.absmax},
        )
    ]
