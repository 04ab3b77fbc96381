"""The older FullyShardedDataParallel: parameters without a trace of the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from torch import nn


def is_flattened(model: nn.Module) -> bool:
    """Whether the older FullyShardedDataParallel is in a model: its parameters are plain tensors, of which each rank has a part."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def flattened() -> Finding:
    """Return what there is to say about such a model."""
    return Finding(
        "flat-shards",
        "warning",
        "FullyShardedDataParallel has flattened parameters of this model and split them over ranks: their norms, update ratios and "
        "densities are those of this rank's part, and gradients are the rank's own, before averaging, or not read.",
        "Use torch.distributed.fsdp.fully_shard, whose parameters tell where their parts lie: then norms are those of the whole. "
        "Activations, losses and the guard are not concerned.",
        evidence={"wrapper": "FullyShardedDataParallel"},
    )
