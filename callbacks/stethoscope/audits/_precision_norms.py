"""Normalisations whose input hardly varies: an early warning, before there is any NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST = 0.5
"""Share of groups; some rows are padding in healthy models."""


def flat_share(module: nn.Module, x: Tensor) -> float | None:
    """Return the share of a normalisation's groups whose variance is below its eps; None for other modules.

    Groups that are all zero (padding, silence) do not count. Below eps, `(x - mean) / sqrt(var + eps)` no longer has the variance 1:
    the level of the input decides, and small differences are amplified up to `1 / sqrt(eps)` times.

    Args:
        module: LayerNorm (groups: rows) or GroupNorm (groups: of channels, per item).
        x: its input.
    """
    if isinstance(module, nn.LayerNorm):
        groups = x.flatten(-len(module.normalized_shape))
    elif isinstance(module, nn.GroupNorm):
        groups = x.reshape(x.shape[0], module.num_groups, -1)
    else:
        return None
    if groups.shape[-1] < 2 or not groups.numel():
        return None
    there = groups.abs().amax(-1) > 0
    flat = groups.double().var(-1, unbiased=False) < module.eps
    return float((flat & there).double().sum() / there.double().sum().clamp(min=1))


def nearly_constant(shares: Mapping[str, float], eps: Mapping[str, float]) -> list[Finding]:
    """Return a finding for the normalisation that has the most such groups."""
    bad = {name: share for name, share in shares.items() if share > MOST}
    if not bad:
        return []
    name = max(bad, key=lambda each: bad[each])
    return [
        Finding(
            "precision-headroom",
            "warning",
            f"{bad[name]:.0%} of what {name or 'the model'!r} normalises has a variance below its eps ({eps[name]:g})"
            f"{f', and {len(bad) - 1} more modules are like it' if len(bad) > 1 else ''}: the level of the input decides.",
            "Scale the input up before it, e.g. to rms 1, or lower eps; a variance of zero is a division by sqrt(eps).",
            module=name,
            evidence={"flat_share": round(bad[name], 3), "eps": eps[name]},
        )
    ]
