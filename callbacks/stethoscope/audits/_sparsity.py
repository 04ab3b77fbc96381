"""How sparse a model is now, and what it will weigh when exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from stethoscope import _density
from stethoscope._record import Finding, Report

if TYPE_CHECKING:
    from torch import Tensor, nn

_LENGTHS = (1, 2, 4, 8, 16, 32)
_INDEX_BYTES = 4


class MatrixDensity(NamedTuple):
    """One weight matrix.

    Args:
        name: the parameter's qualified name.
        shape: rows and columns; a convolution's kernel counts as columns.
        nonzero: elements that are not zero.
        density: their share, in [0, 1].
        block: rows and columns of the blocks, given or found; (1, 1) for none.
        block_density: share of blocks that are not all zero.
        target: density asked for, None for none.
    """

    name: str
    shape: tuple[int, int]
    nonzero: int
    density: float
    block: tuple[int, int]
    block_density: float
    target: float | None


@dataclass(frozen=True, kw_only=True)
class SparsityReport(Report):
    """How sparse a model is.

    Args:
        matrices: the weight matrices examined.
        weights: their elements.
        nonzero: those that are not zero.
        dense_bytes: size of all matrices stored dense.
        sparse_bytes: size of all matrices stored as the blocks that are not zero, each with an index of 4 bytes.
        target_weights: elements that would stay at the target densities, all of a matrix without target.
        times_larger: `nonzero / target_weights`, 1 without target.
    """

    matrices: tuple[MatrixDensity, ...] = ()
    weights: int = 0
    nonzero: int = 0
    dense_bytes: int = 0
    sparse_bytes: int = 0
    target_weights: int = 0
    times_larger: float = 1.0


def sparsity(
    model: nn.Module,
    *,
    weights: Sequence[str] = ("*",),
    target: float | Mapping[str, float] | None = None,
    block: tuple[int, int] | None = None,
    bytes_per_weight: int = 1,
) -> SparsityReport:
    """Count what is not zero in the weight matrices and predict the exported size.

    Ask right after the sparsifier ran: an optimizer refills zeros within one step. Masks of `torch.nn.utils.prune` and
    of torchao's sparsifier are applied. The file size of a checkpoint says nothing: zeros are stored like other numbers.

    **Found blocks:** of the shapes with 1 to 32 rows and columns the largest whose non-zero blocks are full, but for a tenth of
    the density's complement (a kept diagonal).
    **Cost:** several passes over the matrices; waits for the device.

    Args:
        model: on any device but meta.
        weights: patterns of parameter names to examine.
        target: density asked for, of all or by pattern of parameter names; more than 0.05 above it is a finding.
        block: rows and columns of a block; None finds them.
        bytes_per_weight: in the exported model, 1 for int8.

    Raises:
        ValueError: a target outside of [0, 1], a block that is no pair of positive lengths, a model on the meta device,
            a pattern that matches no matrix.

    Examples:
        >>> from torch import nn
        >>> layer = nn.Linear(8, 3)
        >>> _ = nn.init.zeros_(layer.weight[1:])
        >>> report = sparsity(layer)
        >>> report.weights, report.nonzero
        (24, 8)
    """
    chosen = _chosen(model, (weights,) if isinstance(weights, str) else weights)
    _check(chosen, target, block)
    found = [_examine(matrix.name, matrix.effective(), block, _target_of(matrix.name, target)) for matrix in chosen]
    dense = sum(item.shape[0] * item.shape[1] for item in found)
    nonzero = sum(item.nonzero for item in found)
    stored = sum(_stored_bytes(item, bytes_per_weight) for item in found)
    stays = sum(round(item.shape[0] * item.shape[1] * (1.0 if item.target is None else item.target)) for item in found)
    times = nonzero / stays if stays and target is not None else 1.0
    findings = [_missed(item) for item in found if item.target is not None and item.density > item.target + 0.05]
    compared = f", {times:.1f} times the {stays} of the target" if target is not None else ""
    return SparsityReport(
        title=f"sparsity of {len(found)} weight matrices",
        summary=(
            f"{nonzero} of {dense} weights are not zero{compared}\n"
            f"export: {dense * bytes_per_weight} bytes dense, {stored} bytes sparse"
        ),
        findings=tuple(findings),
        matrices=tuple(found),
        weights=dense,
        nonzero=nonzero,
        dense_bytes=dense * bytes_per_weight,
        sparse_bytes=stored,
        target_weights=stays,
        times_larger=times,
    )


def _chosen(model: nn.Module, patterns: Sequence[str]) -> list[_density.Matrix]:
    known = list(_density.matrices(model))
    chosen = [matrix for matrix in known if any(fnmatchcase(matrix.name, pattern) for pattern in patterns)]
    if known and not chosen:
        names = ", ".join(matrix.name for matrix in known[:10])
        raise ValueError(f"No weight matrix matches {list(patterns)}. Those of the model: {names}.")
    if any(matrix.weight.is_meta for matrix in chosen):
        raise ValueError("A model on the meta device has no weights to count. Load them first.")
    return chosen


def _check(
    chosen: Sequence[_density.Matrix], target: float | Mapping[str, float] | None, block: tuple[int, int] | None
) -> None:
    wanted = list(target.values()) if isinstance(target, Mapping) else [] if target is None else [target]
    if not all(0 <= value <= 1 for value in wanted):
        raise ValueError(f"Target densities are {wanted}. Legal: the share of weights that stay, 0 to 1.")
    for pattern in target if isinstance(target, Mapping) else ():
        if not any(fnmatchcase(matrix.name, pattern) for matrix in chosen):
            names = ", ".join(matrix.name for matrix in chosen[:10])
            raise ValueError(f"The target of {pattern!r} matches no weight matrix. Examined: {names}.")
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise ValueError(f"block is {block}. Legal: None or (rows, columns), both 1 or more, e.g. (8, 4).")


def _target_of(name: str, target: float | Mapping[str, float] | None) -> float | None:
    if isinstance(target, Mapping):
        return next((value for pattern, value in target.items() if fnmatchcase(name, pattern)), None)
    return target


def _examine(name: str, weight: Tensor, block: tuple[int, int] | None, target: float | None) -> MatrixDensity:
    shape = (weight.shape[0], weight.shape[1])
    there = _density.filled(weight)
    nonzero = int(there.sum())
    density = nonzero / max(weight.numel(), 1)
    shapes = [block] if block is not None else [(rows, columns) for rows in _LENGTHS for columns in _LENGTHS]
    best, blocks = (1, 1), nonzero
    for rows, columns in sorted(shapes, key=lambda pair: pair[0] * pair[1], reverse=True) if 0 < density < 0.98 else []:
        counted = _density.filled_blocks(there, (rows, columns))
        if counted is None:
            continue
        area, number = rows * columns, int(counted)
        if block is not None or nonzero >= (1 - 0.1 * (1 - density)) * number * area:
            best, blocks = (rows, columns), number
            break
    return MatrixDensity(
        name, shape, nonzero, density, best, blocks * best[0] * best[1] / max(weight.numel(), 1), target
    )


def _stored_bytes(item: MatrixDensity, bytes_per_weight: int) -> int:
    dense = item.shape[0] * item.shape[1] * bytes_per_weight
    if item.density >= 0.98:
        return dense
    area = item.block[0] * item.block[1]
    blocks = round(item.block_density * item.shape[0] * item.shape[1] / area)
    return min(dense, blocks * (area * bytes_per_weight + _INDEX_BYTES))


def _missed(item: MatrixDensity) -> Finding:
    number = item.shape[0] * item.shape[1]
    assert item.target is not None
    wanted = round(number * item.target)
    times = f", {item.nonzero / wanted:.1f} times as many" if wanted else ""
    return Finding(
        "sparsity-missed",
        "error",
        f"'{item.name}' has {item.nonzero} weights that are not zero instead of {wanted}{times} (density {item.density:.3f}, target {item.target:.3f}).",
        "Compare the sparsifier's start and stop with the steps that were made (audits.plan), and export what it left, before another optimizer step.",
        module=item.name,
        evidence={"nonzero": item.nonzero, "target": item.target, "weights": number},
    )
