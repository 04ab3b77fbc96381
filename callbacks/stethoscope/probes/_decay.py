"""How much of the weights an optimizer's weight decay takes per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


def decay_of(optimizer: Optimizer) -> float:
    """Return the largest share of a weight that one step's weight decay takes where no gradient opposes it, over all groups.

    `lr * weight_decay` where the decay is decoupled (Loshchilov and Hutter 2019), over `1 - momentum` for SGD, whose momentum gathers it. 0
    where it passes through a division by the gradient's size (Adam, RMSprop), which bounds it by the learning rate, and where the learning
    rate is on a device, which is not waited for.

    Examples:
        >>> weight = [torch.nn.Parameter(torch.ones(2))]
        >>> decay_of(torch.optim.AdamW(weight, lr=0.1, weight_decay=0.5))
        0.05
    """
    sgd = type(optimizer) is torch.optim.SGD
    apart = sgd or isinstance(optimizer, torch.optim.AdamW | torch.optim.Adafactor)
    shares = [0.0]
    for group in optimizer.param_groups:
        rate, decay, momentum = group.get("lr"), group.get("weight_decay"), group.get("momentum", 0.0) if sgd else 0.0
        if isinstance(rate, Tensor) and rate.device.type == "cpu":
            rate = float(rate)
        if not (group["params"] and (apart or group.get("decoupled_weight_decay"))):
            continue
        if isinstance(rate, int | float) and isinstance(decay, int | float) and isinstance(momentum, int | float):
            shares.append(rate * decay / max(1 - momentum, 1e-3))
    return max(shares)
