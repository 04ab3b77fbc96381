"""Which matrices of a model count for sparsity, and how many of their elements and blocks are not zero. Device side.

Shared by `probes.Density` (in the loop) and `audits.sparsity` (once).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from stethoscope._shards import local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class Matrix(NamedTuple):
    """A weight matrix and the mask that a pruner multiplies it with, if there is one."""

    name: str
    weight: Tensor
    mask: Tensor | None

    def effective(self) -> Tensor:
        """What the model computes with, as (rows, columns): a convolution's kernel counts as columns.

        Of a matrix that is split over ranks (DTensor), this rank's part: an operation on the whole would wait for others.
        """
        weight = local(self.weight).detach()
        if self.mask is not None:
            weight = weight * local(self.mask)
        return weight.flatten(1)


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Floating-point parameters with at least two lengths above one, tied ones once, under the names users know.

    `torch.nn.utils.prune` keeps `weight_orig` and `weight_mask`, torchao's sparsifier `parametrizations.weight.original`
    and `.0.mask`: both are named `weight`.
    """
    buffers = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.layout != torch.strided:
            continue  # no shape yet; no dense storage to count in
        if parameter.is_floating_point() and sum(length > 1 for length in parameter.shape) > 1:
            if name.endswith("_orig"):
                plain = name.removesuffix("_orig")
                yield Matrix(plain, parameter, buffers.get(f"{plain}_mask"))
            elif name.endswith(".original") and "parametrizations." in name:
                head = name.removesuffix("original")
                mask = next((buffers[key] for key in buffers if key.startswith(head) and key.endswith(".mask")), None)
                yield Matrix(head.rstrip(".").replace("parametrizations.", ""), parameter, mask)
            else:
                yield Matrix(name, parameter, None)


def filled(matrix: Tensor) -> Tensor:
    """Which elements are not zero; NaN is not. `bool()` takes a fifth of the time of `!= 0`."""
    return matrix.bool()


def pruned_density(matrix: Tensor) -> Tensor:
    """Density of a matrix as somebody pruned it, 0-d: 1 where the zeros look like an initialisation.

    Elements that are not zero over (rows that are not empty x columns that are not empty), since initialisations set whole
    slices to zero (LoRA's second factor, new input channels, padding rows); and 1 with at most one such element per row
    or column, as in an identity.
    """
    there = filled(matrix)
    number = torch.count_nonzero(there)
    corner = torch.count_nonzero(there.any(0)) * torch.count_nonzero(there.any(1))
    sparse = number > max(matrix.shape)
    return torch.where(sparse, number / corner.clamp(min=1), torch.ones_like(number, dtype=torch.float32))


def filled_blocks(there: Tensor, block: tuple[int, int]) -> Tensor | None:
    """Number of blocks (rows, columns) with an element that is not zero, 0-d; None where they do not tile the matrix.

    Args:
        there: from `filled`.
        block: rows and columns.
    """
    rows, columns = block
    if not there.numel() or there.shape[0] % rows or there.shape[1] % columns:
        return None
    # rows first, in bytes: whole rows are compared at once
    bands = there.contiguous().view(torch.uint8).reshape(-1, rows, there.shape[1]).amax(1)
    return torch.count_nonzero(bands.view(-1, columns).amax(1))
