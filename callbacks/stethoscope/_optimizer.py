"""What an optimizer does wrong by itself: numbers that are no numbers, and writes that are not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope._record import Finding

if TYPE_CHECKING:
    from torch.optim import Optimizer


def bad_settings(optimizer: Optimizer) -> list[Finding]:
    """Return a finding for the first parameter group with a number that is NaN or Inf, such as its learning rate.

    Looks at Python numbers only: a learning rate on the device is not waited for.
    """
    for i, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            several = value if isinstance(value, tuple | list) and name != "params" else (value,)
            if any(isinstance(each, float) and not math.isfinite(each) for each in several):
                return [
                    Finding(
                        "nonfinite-optimizer",
                        "error",
                        f"{name} of parameter group {i} of {type(optimizer).__name__} is {value}: every weight of the group "
                        "would become non-finite.",
                        "Look at the scheduler that sets it: a division by zero steps, a warm-up of length zero.",
                        evidence={"origin": "optimizer", "group": i, "setting": name, "value": str(value)},
                    )
                ]
    return []


def bad_write(optimizer: Optimizer, parameter: Tensor, name: str) -> Finding:
    """Return the finding for a weight that the last step wrote non-finite although its gradients were finite."""
    groups = enumerate(optimizer.param_groups)
    number = next((i for i, group in groups if any(each is parameter for each in group["params"])), None)
    group: dict[str, Any] = optimizer.param_groups[number] if number is not None else {}
    settings = {
        key: value for key, value in group.items() if isinstance(value, int | float | bool) and value is not None
    }
    state = {
        key: _describe(key, value)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    spoilt = [key for key, said in state.items() if said != "finite"]
    kind = str(parameter.dtype).removeprefix("torch.")
    return Finding(
        "nonfinite-optimizer",
        "error",
        f"The parameter {name!r} ({kind}, group {number}) was written non-finite by {type(optimizer).__name__} in the step "
        f"before, from finite gradients. Its state: {', '.join(f'{key} {said}' for key, said in state.items()) or 'none'}.",
        _advice(parameter, settings, spoilt) + " Go back to a checkpoint: the weight is lost.",
        module=name.rpartition(".")[0],
        evidence={
            "origin": "optimizer",
            "parameter": name,
            "group": number,
            "settings": {key: str(value) for key, value in settings.items()},
            "state": state,
        },
    )


def _advice(parameter: Tensor, settings: dict[str, Any], spoilt: list[str]) -> str:
    """Say what to try: the first thing that explains the write."""
    if spoilt:
        return f"Compare {spoilt[0]} with the checkpoint that was resumed from: is it of this optimizer and this order of parameters?"
    eps = settings.get("eps")
    if eps is not None and not torch.tensor(eps).to(parameter.dtype):
        return f"eps is {eps}, which is 0 in this dtype: a gradient of zero becomes 0/0. Set 1e-8, in fp16 1e-4, or keep weights and state in fp32."
    return "The step was too long: look at the learning rate that it was made with, and at the norm of the gradients."


def _describe(name: str, tensor: Tensor) -> str:
    if bool(torch.isnan(tensor).any()):
        return "NaN"
    if bool(torch.isinf(tensor).any()):
        return "Inf"
    return f"negative ({float(tensor.min()):.3g})" if _is_square(name) and bool((tensor < 0).any()) else "finite"


def _is_square(name: str) -> bool:
    """Whether a state tensor sums squares or magnitudes: Adam, RMSprop, Adadelta; Adagrad; Adamax."""
    return name.endswith(("_sq", "square_avg")) or name in ("acc_delta", "sum", "exp_inf")
