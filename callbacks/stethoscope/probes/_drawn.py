"""Whether a weight is still as an initialisation has drawn it: what was trained has lost the exact shape of its distribution."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 256
"""Values of a weight that a verdict needs."""

_UNIFORM = 1.8  # four deviations of rms over bound, of n values: 4 * 0.447 / sqrt(n)
_KURTOSIS = 4 * 24**0.5  # four deviations of the kurtosis of n normal values, times sqrt(n)
_RMS = 4 / 2**0.5  # four deviations of their rms, relative, times sqrt(n)
_TRANSFORMER = 0.02  # the deviation of GPT, BERT and the vision transformer


def drawn(weight: Tensor) -> Tensor:
    """1 where the values of `weight`, shape (outputs, inputs, ...), are those of a fresh draw, 0-d.

    Uniform, of any width: the rms is the largest value over sqrt(3), which a few steps of training undo, since some values leave the
    bounds. Normal: a kurtosis of 3 and the rms of LeCun, Kaiming, Xavier (fan in or out) or 0.02. 0 for fewer than 256 values,
    of which four deviations are more than 40 steps of training may change.

    Examples:
        >>> weight = torch.nn.Linear(32, 32).weight.detach()
        >>> float(drawn(weight)), float(drawn(weight**3))
        (1.0, 0.0)
    """
    count = weight.numel()
    if count < FEWEST:
        return weight.new_zeros(())
    square = weight.square()
    mean = square.mean()
    rms = mean.sqrt()
    slack = 1 / count**0.5
    uniform = (rms * 3**0.5 / weight.abs().amax() - 1).abs() < _UNIFORM * slack
    kernel = weight[0, 0].numel()
    fan_in, fan_out = kernel * weight.shape[1], kernel * weight.shape[0]
    usual = (_TRANSFORMER, fan_in**-0.5, (2 / fan_in) ** 0.5, (2 / fan_out) ** 0.5, (2 / (fan_in + fan_out)) ** 0.5)
    normal = (square.square().mean() / mean.square() - 3).abs() < _KURTOSIS * slack
    known = torch.stack([(rms / each - 1).abs() < _RMS * slack for each in usual]).any()
    fresh: Tensor = uniform | (normal & known)
    return fresh.to(weight.dtype)
