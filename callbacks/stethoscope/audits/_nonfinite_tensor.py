"""What one tensor says about NaN and Inf: flags, storage, samples, headroom. Waits for the device: audits run outside the loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Flags(NamedTuple):
    """What is in a tensor that is not finite."""

    nan: bool = False
    positive: bool = False
    negative: bool = False

    @property
    def inf(self) -> bool:
        """Whether there is an Inf of either sign."""
        return self.positive or self.negative


FINITE = Flags()


def values(tensor: Tensor) -> Tensor:
    """Return the numbers of a dense, nested or sparse tensor as a dense one, without its graph."""
    tensor = tensor.detach()
    if tensor.is_nested:
        return tensor.values()
    if tensor.layout is torch.sparse_coo:
        return tensor._values()  # noqa: SLF001 - values() wants a coalesced tensor
    return tensor if tensor.layout is torch.strided else tensor.values()


def _readable(tensor: Tensor) -> Tensor:
    """Return `values` in a dtype that has the operations that are needed here: float8 has hardly any."""
    dense = values(tensor)
    return dense.float() if dense.is_floating_point() and dense.element_size() == 1 else dense


def flags(tensor: Tensor) -> Flags:
    """Look at every value; integers and tensors without data are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return FINITE
    dense = _readable(tensor)
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())
    # a finite sum proves that all is finite, at a tenth of the price of isfinite; an overflowing one proves nothing
    if not dense.numel() or math.isfinite(float(dense.sum(dtype=_wide(dense)))):
        return FINITE
    return Flags(bool(dense.isnan().any()), bool(torch.isposinf(dense).any()), bool(torch.isneginf(dense).any()))


def _wide(dense: Tensor) -> torch.dtype:
    return torch.float64 if dense.dtype is torch.float64 else torch.float32


def storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return where the numbers live, shared by all views; None where nothing can be said."""
    try:
        return values(tensor).untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def inside(value: object) -> Iterator[Tensor]:
    """Find the tensors among the arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from inside(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from inside(each)


def heal(tensor: Tensor) -> None:
    """Write finite numbers in place of those that are not."""
    tensor.copy_(torch.nan_to_num(_readable(tensor), nan=1.0, posinf=1.0, neginf=-1.0).to(tensor.dtype))


def samples(tensor: Tensor, batch: int | None) -> tuple[int, ...]:
    """Return the indices in the batch that hold something not finite.

    The batch is the first dimension of its size, or is folded into the first dimension, item by item, as in
    `(batch * heads, time, time)`. Empty where neither is true.
    """
    if not batch or tensor.dim() == 0:
        return ()
    if tensor.is_nested:
        parts = tensor.detach().unbind()
        return tuple(i for i, part in enumerate(parts) if any(flags(part))) if len(parts) == batch else ()
    bad = ~torch.isfinite(_readable(tensor))
    if batch in bad.shape:
        bad = bad.movedim(tuple(bad.shape).index(batch), 0)
    elif bad.shape[0] % batch == 0 and bad.shape[0]:
        bad = bad.reshape(batch, -1)
    else:
        return ()
    return tuple(bad.reshape(batch, -1).any(1).nonzero().flatten().tolist())


def varies(tensor: Tensor) -> bool:
    """Whether a tensor holds more than one number, unlike `torch.ones(n, n)`."""
    numbers = values(tensor).flatten()
    return bool((numbers[1:] != numbers[:1]).any())


def absmax(tensors: Iterator[Tensor]) -> float | None:
    """Return the largest finite magnitude, None without one."""
    found = [_readable(each).abs() for each in tensors if each.is_floating_point() or each.is_complex()]
    tops = [float(each[torch.isfinite(each)].max()) for each in found if bool(torch.isfinite(each).any())]
    return max(tops, default=None)


def needed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """Return the largest magnitude of an operation's result in float64; None where that is not finite or not known."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    try:
        result = func(*_double(args), **_double({name: value for name, value in kwargs.items() if name != "dtype"}))
    except Exception:  # the operation knows no float64
        return None
    top = 0.0
    for each in inside(result):
        if any(flags(each)):
            return None
        top = max(top, absmax(iter([each])) or 0.0)
    return top


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_complex():
            return value.to(torch.complex128)
        return value.to(torch.float64) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_double(each) for each in value)
    return {name: _double(each) for name, each in value.items()} if isinstance(value, dict) else value


def headroom_bits(top: float, dtype: torch.dtype) -> float:
    """Return log2 of the dtype's largest number over `top`, in bits; negative means that it does not fit.

    Examples:
        >>> headroom_bits(65504 * 4, torch.float16)
        -2.0
    """
    return math.log2(torch.finfo(dtype).max / top) if top else math.inf
