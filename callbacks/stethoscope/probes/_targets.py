"""How the targets of a regression lie to what the last activation can reach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from stethoscope import stats
from stethoscope._protocols import Columns, Key

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTPUTS = ("outputs", "output", "predictions", "logits")
TARGETS = ("targets", "target", "labels", "label", "y")
"""Names under which they may be given."""

ENOUGH = 8
"""Targets of a step that say anything."""

REACH = {
    **dict.fromkeys(("SigmoidBackward", "SoftmaxBackward", "HardsigmoidBackward"), (0.0, 1.0)),
    **dict.fromkeys(("ReluBackward", "SoftplusBackward", "ExpBackward"), (0.0, math.inf)),
    "TanhBackward": (-1.0, 1.0),
    "LogSoftmaxBackward": (-math.inf, 0.0),
}
"""Smallest and largest value that comes out of an operation, by its node in the graph."""

STATISTICS = ("rms", "low", "high", "beyond", "loss_gap")


def pair(given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return outputs and targets that belong to each other value by value, None where there are none."""
    outputs = next((given[name] for name in OUTPUTS if name in given), None)
    targets = next((given[name] for name in TARGETS if name in given), None)
    if outputs is None or targets is None or not (outputs.is_floating_point() and targets.is_floating_point()):
        return None
    same = [size for size in outputs.shape if size != 1] == [size for size in targets.shape if size != 1]
    return (outputs, targets) if same and targets.numel() >= ENOUGH and outputs.device == targets.device else None


def measure(outputs: Tensor, targets: Tensor, loss: Tensor, module: str, operation: str) -> list[Columns]:
    """Compare targets with outputs, and both with the loss.

    Args:
        outputs: floating point.
        targets: the same sizes, but for axes of one.
        loss: one element.
        module: that has returned the outputs, `""` where that is not known.
        operation: name of the node that made the outputs.

    Returns:
        `output/rms`; `target/rms`, `target/low`, `target/high`; `target/beyond`, the mean square of what lies beyond the reach of the
        operation, over the variance of the targets; `target/loss_gap`, how far the loss is, relative to itself, from the nearest of their
        mean squared, absolute, smooth absolute error and binary cross entropy with logits, mean or sum over all or all but the first axis.
    """
    with torch.no_grad():
        y = outputs.detach().float().flatten()
        t = targets.detach().float().flatten()
        variance, middle = torch.var_mean(t, correction=0)
        low, high = REACH.get(operation, (-math.inf, math.inf))
        beyond = (t - t.clamp(low, high)).square().mean() / variance.clamp(min=1e-30)
        errors = torch.stack([
            functional.mse_loss(y, t), functional.l1_loss(y, t), functional.smooth_l1_loss(y, t), functional.binary_cross_entropy_with_logits(y, t)
        ])  # fmt: skip
        sizes = stats.upload([1.0, float(len(t)), len(t) / len(targets)], torch.float32, y.device)
        value = loss.detach().float().reshape(())
        gap = ((errors[:, None] * sizes - value).abs() / value.abs().clamp(min=1e-30)).amin()
        least, most = t.aminmax()
        rms = (variance + middle.square()).sqrt()
        values = torch.stack([y.square().mean().sqrt(), rms, least, most, beyond, gap])
    keys = [Key("output/rms", module), *(Key(f"target/{name}", module) for name in STATISTICS)]
    return [Columns(keys, values, range(len(keys)))]
