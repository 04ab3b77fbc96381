"""What `Units` works out of one tensor: ranges of channels, saturation, starved normalisations, heads. Nothing waits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VALUES = 65536
"""Values of a tensor that are looked at."""

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)  # noqa: SLF001  # only their base knows all convolutions
CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,  # noqa: SLF001
    nn.modules.batchnorm._NormBase,  # noqa: SLF001
    nn.GroupNorm,
)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
NOWHERE_FLAT = (
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
    nn.Mish,
    nn.LeakyReLU,
    nn.PReLU,
)
DROPOUT = nn.modules.dropout._DropoutNd  # noqa: SLF001  # only their base knows all of them
PASSING_ON = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Softmax,  # what is exactly zero was masked
    DROPOUT,
    nn.modules.pooling._MaxPoolNd,  # noqa: SLF001
    nn.modules.pooling._AvgPoolNd,  # noqa: SLF001
    nn.modules.pooling._AdaptiveAvgPoolNd,  # noqa: SLF001
    nn.modules.pooling._AdaptiveMaxPoolNd,  # noqa: SLF001
)
"""What makes no zeros of its own for all items: units that are dead were so before."""

OPEN = 0.99
"""A sigmoid above is open."""

DIFFERENT, SAME = 1e-3, 1e-5
"""Differences between items, over the largest value: above they are no rounding, below nothing else in float32."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_OUT = ("out_proj", "o_proj", "c_proj", "to_out", "out", "proj", "wo")
_FAINT = 1e-3


def channel_axis(module: nn.Module, x: Tensor) -> int | None:
    """The axis of the units, or None where the module does not tell."""
    if isinstance(module, CHANNELS_LAST):
        return -1
    if isinstance(module, CHANNELS_FIRST):
        return 1 if x.dim() > 2 or not isinstance(module, nn.modules.conv._ConvNd) else 0  # noqa: SLF001
    return -1 if x.dim() == 2 else None


def items_of(args: tuple[object, ...]) -> int:
    """The size of the batch that a model is given, 0 where none can be told."""
    first = next((each for each in args if isinstance(each, Tensor) and not each.is_nested and each.dim() > 1), None)
    return 0 if first is None else len(first)


def is_single(x: Tensor, items: int) -> bool:
    """Whether a batch of `items` has become one item: a vector, or a first axis of one, and no axis that could be theirs."""
    return items > 1 and not x.is_nested and x.dim() > 0 and (x.dim() == 1 or len(x) == 1) and items not in x.shape


def differs(low: Tensor, high: Tensor, spread: Tensor) -> Tensor:
    """Largest difference between items over the largest absolute value, 0-d, of what `ranges` returns; NaN where all is zero."""
    return spread / torch.maximum(low.abs(), high.abs()).amax()


def ranges(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest value per channel, shape (channels,), and the largest difference between items, 0-d."""
    low, high = x.amin(0), x.amax(0)
    spread = (high - low).amax()
    if axis == 0:
        return x.flatten(1).amin(1), x.flatten(1).amax(1), spread
    axis = (axis - 1 if axis > 0 else axis) % low.dim()
    others = [i for i in range(low.dim()) if i != axis]
    return (low.amin(others), high.amax(others), spread) if others else (low, high, spread)


def saturation(module: nn.Module, y: Tensor, axis: int) -> Tensor | None:
    """Share of units with 90 % of their values in the flat ends, 0-d; None for other modules."""
    if isinstance(module, (nn.Tanh, nn.Sigmoid)):
        return flat_units(y, axis, signed=isinstance(module, nn.Tanh))
    if isinstance(module, nn.Softmax) and module.dim is not None and y.shape[module.dim] > 1:
        return (y.amax(module.dim) > 0.999).to(y.dtype).mean()
    return None


def flat_units(y: Tensor, axis: int, *, signed: bool) -> Tensor:
    """Share of units with 90 % of their values in the flat ends of a tanh (`signed`) or a sigmoid, 0-d."""
    flat = y.abs() > 0.99 if signed else (y < 0.01) | (y > 0.99)
    others = [i for i in range(y.dim()) if i != axis % y.dim()]
    return (flat.to(y.dtype).mean(others) > 0.9).to(y.dtype).mean()


def normalises(module: nn.Module) -> bool:
    """Whether a module divides by a deviation."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)  # noqa: SLF001
    return isinstance(module, norms)


def starved(module: nn.Module, x: Tensor) -> Tensor:
    """Share of the groups that are normalised whose variance is below eps, though they are not all zero, 0-d."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        groups = x.flatten(-len(module.normalized_shape)).flatten(0, -2)
    elif isinstance(module, nn.GroupNorm):
        groups = x.reshape(x.shape[0] * module.num_groups, -1)
    elif isinstance(module, nn.modules.instancenorm._InstanceNorm):  # noqa: SLF001
        groups = x.flatten(2).flatten(0, 1) if x.dim() > 2 else x
    else:
        groups = x.transpose(0, 1).flatten(1)
    square = groups.square().mean(1)
    # in two passes: var() takes six times as long on the CPU
    variance = square if isinstance(module, nn.RMSNorm) else (groups - groups.mean(1, keepdim=True)).square().mean(1)
    eps = getattr(module, "eps", None)
    eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
    return ((variance < eps) & (square > 0)).to(x.dtype).mean()


def heads_into(name: str, parent: nn.Module | None) -> int:
    """The number of attention heads whose outputs the module `name` joins, 0 where it is no such module."""
    if parent is None or name.rpartition(".")[2] not in _OUT or isinstance(parent, nn.MultiheadAttention):
        return 0
    number = next((value for value in (getattr(parent, each, None) for each in _HEADS) if isinstance(value, int)), 0)
    return number if number > 1 else 0


def head_strength(module: nn.MultiheadAttention) -> Tensor | None:
    """Norm of each head's values times that of its part of the output's weight, shape (heads,)."""
    out, heads = module.out_proj.weight, module.num_heads
    value = module.in_proj_weight.chunk(3)[2] if module.in_proj_weight is not None else module.v_proj_weight
    if heads < 2 or value is None or hasattr(out, "to_local"):
        return None
    into: Tensor = torch.linalg.vector_norm(value.reshape(heads, -1).float(), dim=1)
    back: Tensor = torch.linalg.vector_norm(out.t().reshape(heads, -1).float(), dim=1)
    strength: Tensor = into * back
    return strength


def dead(strength: Tensor) -> Tensor:
    """Share of heads far below the strongest one, 0-d."""
    return (strength < _FAINT * strength.amax()).to(strength.dtype).mean()
