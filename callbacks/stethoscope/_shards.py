"""Tensors that are split over ranks (DTensor: FSDP2, HSDP, tensor parallelism): this rank's part, and its share.

Every operation on a DTensor may be a collective, in which a rank that observes another step would never take part. So
probes read local parts only, and say so in the names of their records; parts are put together from records of all ranks.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "shard_"
"""Before a statistic that tells about this rank's part alone."""


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, any other tensor as it is. No collective, no copy."""
    to_local = getattr(x, "to_local", None)
    part: Tensor = x if to_local is None else to_local()
    return part


def parts(x: Tensor) -> int:
    """Return in how many different parts a tensor lies: 1 where every rank holds it whole.

    Replicas count once: over 2 x 4 ranks (HSDP), each of 4 parts is there twice.

    Examples:
        >>> import torch
        >>> parts(torch.ones(3))
        1
    """
    placements = getattr(x, "placements", None)
    if placements is None:
        return 1
    mesh: Any = x.device_mesh  # type: ignore[attr-defined]  # it has both or neither
    number = 1
    for axis, placement in enumerate(placements):
        # _StridedShard, of FSDP over tensor parallelism, is a Shard that does not say so
        if not (placement.is_replicate() or placement.is_partial()):
            number *= mesh.size(axis)
    return number


def prefix(x: Tensor) -> str:
    """Return what to put before the statistics of a tensor: nothing where it is whole."""
    return PREFIX if parts(x) > 1 else ""


def tiles(x: Tensor, block: tuple[int, int]) -> bool:
    """Return whether blocks (rows, columns) tile each part of a matrix; the same answer on every rank.

    Args:
        x: a whole tensor or a DTensor; the first axis counts as rows, the others as columns.
        block: rows and columns.
    """
    number = parts(x)
    if number == 1:
        return True
    placements = x.placements  # type: ignore[attr-defined]  # it has several parts
    rows = x.shape[0]
    by_rows = all(each.is_replicate() or (each.is_shard() and each.dim == 0) for each in placements)
    return by_rows and rows % block[0] == 0 and ceil(rows / number) % block[0] == 0
