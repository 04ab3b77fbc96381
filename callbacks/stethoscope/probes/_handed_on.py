"""Values that need not be read, since they are finite where what was read just before is.

Half of what a transformer's layer passes from module to module leaves a dropout or an activation function, which cannot make NaN or
Inf of finite values. What is written into such a value through `.data` stays unseen until the next module that is read, since torch
counts no such write.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_EXACT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten)
"""Not finite just where the input is not: zero times NaN or Inf is NaN, so that a dropout hides nothing."""
_FINITE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
"""Finite where the input is; where it is Inf they may be finite, too."""
_FUNCTIONS = {
    "EluBackward0", "GeluBackward0", "HardsigmoidBackward0", "HardswishBackward0", "HardtanhBackward0", "LeakyReluBackward0",
    "LogSigmoidBackward0", "MishBackward0", "ReluBackward0", "SigmoidBackward0", "SiluBackward0", "SoftplusBackward0", "TanhBackward0",
}  # fmt: skip
_FACTORS = {nn.CELU: "alpha", nn.ELU: "alpha", nn.LeakyReLU: "negative_slope", nn.Softplus: "beta"}
_SAVED = {
    "EluBackward0": "_saved_alpha", "LeakyReluBackward0": "_saved_negative_slope", "SoftplusBackward0": "_saved_beta",
}  # fmt: skip
"""A number that a user gives to an activation function, and that can make NaN or Inf of finite values."""
_ROOMY = (torch.float32, torch.bfloat16, torch.float64)
"""In float16 a dropout's factor 1 / (1 - p) can overflow on its own."""


def is_exact(module: nn.Module) -> bool:
    """Whether a module returns NaN and Inf just where it is given some."""
    return type(module) in _EXACT and "forward" not in module.__dict__


def is_finite(module: nn.Module) -> bool:
    """Whether a module returns finite values where it is given finite ones, and has finite parameters."""
    return type(module) in _FINITE and "forward" not in module.__dict__


def factor_of(module: nn.Module) -> str:
    """The attribute of an activation function that must be `is_tame` at each call, or nothing."""
    return _FACTORS.get(type(module), "")


def is_tame(factor: object) -> bool:
    """Whether neither a number nor its inverse can take finite values out of range: zero, NaN and huge ones may."""
    return type(factor) in (int, float) and 1e-3 <= abs(factor) <= 1e3  # type: ignore[arg-type]  # mypy knows isinstance alone


def is_untouched(module: nn.Module, output: Tensor) -> bool:
    """Whether what a module returned is as it was computed: no hook but ours can have changed it, nor a narrow dtype."""
    return (
        output.dtype in _ROOMY
        and not output.is_inference()
        and len(module._forward_hooks) == 1  # noqa: SLF001  # torch has no public way to ask
        and not torch_module._global_forward_hooks  # noqa: SLF001
    )


def is_activation_of(value: Tensor, x: Tensor | None) -> bool:
    """Whether autograd made a value by an activation function of `x` alone; False where gradients are off."""
    # asking some views for their function is an error; gradients off, a value can be written to and keep its function
    if x is None or value._is_view() or value._version:  # noqa: SLF001
        return False
    made, before = value.grad_fn, x.grad_fn
    if made is None or before is None or (name := made.name()) not in _FUNCTIONS:
        return False
    if name in _SAVED and not is_tame(getattr(made, _SAVED[name])):
        return False
    return made.next_functions[0] == (before, x.output_nr)  # an operation may have several results
