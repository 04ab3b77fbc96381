"""Formulas for separated signals: pure functions from tensors to tensors, on whatever device these live.

Nothing in here waits for the device or has a shape that depends on values. `B` items, `S` sources, `N` signals, `T`
samples. Cosines are those of mean-free signals, so they are correlation coefficients, without unit, in [-1, 1].
"""

from __future__ import annotations

from math import factorial
from typing import NamedTuple

import torch
from torch import Tensor

ALIKE = 0.95
"""|cos| from which two outputs count as one: the worse of two orthogonal sources is then below 2.8 dB SI-SDR."""

EXCESS = 0.5
"""Least `atanh |cos| - atanh |reference cos|` (Fisher's z): at |cos| 0.95 the references must stay below 0.87."""

QUIET_DB = -40.0
"""Level of a silent output relative to the loudest output of its item, in dB."""

QUIETER_DB = 15.0
"""How much further below the loudest an output must lie than the quietest reference does, in dB."""

MOST_SOURCES = 6
"""Assignments are counted out, n! of them; beyond this many sources there is no margin and no SI-SDR."""

UNRELATED = 0.1
"""|cos| of the mixture and the sum of the references below which they may not belong together: 20 dB of noise leave 0.1."""

FRAMES = 64
"""Parts of an item whose levels make its course; each is longer than most delays and early reflections."""

_EPS = 1e-8
_DISTANT = 60.0  # dB: outputs of a scale-free loss may lie this far below the mixture without being quiet


class Assignment(NamedTuple):
    """Best matching of estimates and references, per item."""

    best: Tensor
    """(B,) int64, number of the best assignment."""
    matches: Tensor
    """(B, S_references) int64, the estimate that each reference got; with fewer estimates, the estimates' references."""
    score: Tensor
    """(B,) mean score of the best assignment, in the unit of the pairwise scores."""
    margin: Tensor
    """(B,) score of the best less that of the second-best assignment, same unit, >= 0."""


def centred(signals: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Remove the mean of the valid samples and blank the rest.

    Args:
        signals: (B, N, T), real.
        lengths: (B,) valid samples per item.

    Returns:
        (B, N, T): `(x - mean(x[:length])) * (t < length)`, in the unit of `signals`.
    """
    if lengths is None:
        return signals - signals.mean(-1, keepdim=True)
    size = signals.shape[-1]
    valid = (torch.arange(size, device=signals.device) < lengths[:, None])[:, None]
    signals = torch.where(valid, signals, 0.0)
    mean = signals.sum(-1, keepdim=True) / lengths.clamp(min=1)[:, None, None]
    return torch.where(valid, signals - mean, 0.0)


def gram(signals: Tensor) -> Tensor:
    """Inner products `sum_t x_i(t) x_j(t)`, (B, N, T) -> (B, N, N), squared unit of the signals."""
    return signals @ signals.transpose(1, 2)


def cosine(products: Tensor) -> Tensor:
    """`g_ij / sqrt(g_ii g_jj)` of a Gram matrix (B, N, N), in [-1, 1]; 0 where a signal is silent."""
    energy = products.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
    return (products / energy[:, :, None] / energy[:, None]).clamp(-1, 1)


def si_sdr_db(cosines: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, `10 log10(c^2 / (1 - c^2))`, cut to about [-70, 70] dB.

    Identical to the usual projection formula for mean-free signals. Le Roux et al. 2019, "SDR - half-baked or well
    done?", arXiv:1811.02508.
    """
    square = cosines.square()
    return 10 * torch.log10((square + 1e-7) / (1 - square + 1e-7))


def largest_pair(cosines: Tensor) -> Tensor:
    """Largest |cos| over pairs of different signals: (B, S, S) -> (B,). Needs at least two signals."""
    own = torch.eye(cosines.shape[-1], dtype=torch.bool, device=cosines.device)
    return cosines.abs().masked_fill(own, 0.0).amax((1, 2))


def largest_pair_delayed(signals: Tensor, scale: Tensor, max_delay: int) -> Tensor:
    """Largest |cos| over pairs and over delays of -max_delay .. max_delay samples, (B, S, T) mean-free -> (B,).

    Blocks of one signal times longer blocks of the other give all lags at once as sums along diagonals of one matrix
    product: `O(T max_delay)` per pair, at the speed of a matrix product.

    Args:
        signals: (B, S, T), mean-free.
        scale: (B, S), the inverse 2-norm of each signal, or 0 to leave it out.
        max_delay: in samples, above 0.
    """
    batch, sources, size = signals.shape
    block = 2 * max_delay
    frames = -(-size // block)
    padded = torch.nn.functional.pad(signals, (max_delay, frames * block - size + max_delay))
    best = []
    for j in range(1, sources):
        wide = padded[:, j].unfold(-1, block + 2 * max_delay, block)
        for i in range(j):
            narrow = padded[:, i, max_delay:-max_delay].reshape(batch, frames, block)
            products = torch.bmm(narrow.transpose(1, 2), wide)
            height, width = products.shape[1:]
            lags = products.as_strided((batch, height, 2 * max_delay + 1), (height * width, width + 1, 1)).sum(1)
            best.append(lags.abs().amax(-1) * scale[:, i] * scale[:, j])
    return torch.stack(best).amax(0).clamp(max=1.0)


def level_db(products: Tensor, count: Tensor | int) -> Tensor:
    """RMS level of each signal in dB re 1, `10 log10(g_ii / count)`: (B, N, N) -> (B, N), at least -160 dB."""
    energy = products.diagonal(dim1=1, dim2=2)
    samples = count[:, None] if isinstance(count, Tensor) else count
    return 10 * torch.log10(energy / samples + 1e-16)


def permutations(n: int, device: torch.device) -> Tensor:
    """All n! orders of `range(n)`, (n!, n) int64, made on the device."""
    rows = torch.zeros((1, 0), dtype=torch.int64, device=device)
    for new in range(n):
        column = torch.full((len(rows), 1), new, dtype=torch.int64, device=device)
        rows = torch.cat([torch.cat([rows[:, :at], column, rows[:, at:]], 1) for at in range(new + 1)])
    return rows


def assign(scores: Tensor) -> Assignment:
    """Find the best matching of rows and columns by counting out.

    Args:
        scores: (B, S_estimates, S_references), higher is better, at most `MOST_SOURCES` of each.

    Returns:
        `Assignment`; where the two numbers differ, every one of the smaller side gets one of the larger.
    """
    if scores.shape[1] < scores.shape[2]:
        scores = scores.transpose(1, 2)
    many, few = scores.shape[1:]
    orders = permutations(many, scores.device)[:, :few]
    means = scores[:, orders, torch.arange(few, device=scores.device)].mean(-1)
    # Each distinct matching appears (many - few)! times, so the second-best one stands that far down.
    ranked = means.topk(min(factorial(many - few) + 1, means.shape[1]), dim=1).values
    best = means.argmax(1)
    return Assignment(best, orders[best], ranked[:, 0], ranked[:, 0] - ranked[:, -1])


def alike(outputs: Tensor, references: Tensor | None) -> Tensor:
    """Whether the outputs of an item count as one: |cos| > 0.95, and Fisher's z in excess of the references by 0.5.

    Args:
        outputs: (B,) largest |cos| over pairs of outputs.
        references: the same of the references; None leaves the second condition out.

    Returns:
        (B,) bool. NaN counts as not alike: ask for non-finite items separately.
    """
    flag = outputs > ALIKE
    if references is None:
        return flag
    return flag & (fisher(outputs) - fisher(references) > EXCESS)


def fisher(cosines: Tensor) -> Tensor:
    """Fisher's z of |cos|, `atanh`, cut at |cos| = 0.99999 (z = 6.1)."""
    return torch.atanh(cosines.abs().clamp(max=0.99999))


def quiet(outputs_db: Tensor, inputs_db: Tensor | None, references_db: Tensor | None) -> Tensor:
    """Whether an item has a silent output: 40 dB below the loudest one, and 15 dB more than the references account for.

    The scale of outputs under a scale-invariant loss is arbitrary, hence levels are relative: to the loudest output, or
    to 60 dB below the loudest input where all outputs are quieter than that.

    Args:
        outputs_db: (B, S) levels in dB.
        inputs_db: (B, anything) levels of mixture and references.
        references_db: (B, S) levels of the references.

    Returns:
        (B,) bool.
    """
    base = outputs_db.amax(1)
    floor = torch.full_like(base, -80.0)
    if inputs_db is not None:
        floor = torch.maximum(floor, inputs_db.amax(1) - _DISTANT)
    depth = outputs_db.amin(1) - torch.maximum(base, floor)
    limit = torch.full_like(depth, QUIET_DB)
    if references_db is not None:
        limit = torch.minimum(limit, references_db.amin(1) - references_db.amax(1) - QUIETER_DB)
    return depth < limit


def sir_sar_db(products: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """Scale-invariant SIR and SAR in dB of each estimate against the reference at the same place.

    The estimate is projected on its reference (target), on all references (target + interference), the rest is artefact:
    `SIR = |target|^2 / |interference|^2`, `SAR = |target|^2 / |artefact|^2`. All of it follows from inner products.
    Le Roux et al. 2019, arXiv:1811.02508, section 2.

    Args:
        products: (B, N, N) Gram matrix whose first `sources` signals are the matched estimates, the next the references.
        sources: S.

    Returns:
        Two (B, S) tensors, cut to about [-80, 80] dB.
    """
    own = products[:, :sources, :sources].diagonal(dim1=1, dim2=2)
    cross = products[:, :sources, sources : 2 * sources]
    among = products[:, sources : 2 * sources, sources : 2 * sources]
    energy = among.diagonal(dim1=1, dim2=2)
    target = cross.diagonal(dim1=1, dim2=2).square() / energy.clamp(min=1e-30)
    ridge = torch.diag_embed(energy.amax(1, keepdim=True).expand_as(energy) * 1e-6 + 1e-30)
    weights = torch.linalg.solve_ex(among + ridge, cross.transpose(1, 2)).result
    explained = (cross.transpose(1, 2) * weights).sum(1)
    interference = (explained - target).clamp(min=0) + _EPS * own
    artefact = (own - explained).clamp(min=0) + _EPS * own
    return 10 * torch.log10(target / interference + _EPS), 10 * torch.log10(target / artefact + _EPS)


def mean_over(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of the values where `keep` holds, NaN where it never does: two tensors of one shape -> 0-d."""
    return torch.where(keep, values, 0.0).sum() / keep.sum()


def unrelated(mixture: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Which mixtures have nothing to do with what they are said to be made of, and which of these fit another item's.

    An item is unrelated where the |cos| with its own mixture is below 0.1, unless over the batch the courses of the levels, rms of 64
    parts, correlate better with those of the own mixtures than with those of others, by three standard errors. Another item's
    fits where |cos| > 0.5.

    Args:
        mixture: (B, T), mean-free.
        total: (B, T), the sum of the references, mean-free.

    Returns:
        (B,) and (B,), 0 or 1; all 0 for fewer than three items or 4 * 64 samples, which say nothing.
    """
    items, size = mixture.shape
    if items < 3 or size < 4 * FRAMES:
        return mixture.new_zeros(items), mixture.new_zeros(items)
    cos = (_unit(total) @ _unit(mixture).T).abs()
    own = torch.eye(items, device=cos.device, dtype=torch.bool)
    course = _unit(_course(total)) @ _unit(_course(mixture)).T
    others = course.masked_fill(own, torch.nan)
    usual = others.nanmean()
    spread = (others - usual).square().nanmean().sqrt()
    belong = course.diagonal().mean() - usual > 3 * spread / items**0.5
    heard = (total.square().sum(1) > 0) & (mixture.square().sum(1) > 0)
    alone = heard & (cos.diagonal() < UNRELATED) & ~belong
    fits = alone & (cos.masked_fill(own, 0.0).amax(1) > 0.5)
    return alone.float(), fits.float()


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).clamp(min=1e-30).sqrt()


def _course(x: Tensor) -> Tensor:
    """(B, T) to the mean-free levels of its 64 parts."""
    parts = x[:, : x.shape[1] // FRAMES * FRAMES].reshape(len(x), FRAMES, -1).square().mean(-1).sqrt()
    return parts - parts.mean(1, keepdim=True)
