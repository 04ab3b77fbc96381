"""Boundary inputs, made from a typical batch of one or several tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope.audits._untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Given = Tensor | tuple[Any, ...] | Mapping[str, Any]


class Batch(NamedTuple):
    """Arguments of a model, by position (`"0"`, `"1"`, ...) or by name.

    Args:
        values: all of them.
        positional: how many are given by position; they come first.
        signal: name of the one that is varied: the first float tensor, else the first tensor of two dimensions or more.
    """

    values: dict[str, Any]
    positional: int
    signal: str

    @property
    def x(self) -> Tensor:
        """The signal, `(batch, ...)`."""
        found: Tensor = self.values[self.signal]
        return found

    def call(self, model: Callable[..., Any]) -> Any:
        """Run a model on it."""
        return model(*self.args, **self.kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        """What is given by position."""
        return tuple(self.values.values())[: self.positional]

    @property
    def kwargs(self) -> dict[str, Any]:
        """What is given by name."""
        return dict(list(self.values.items())[self.positional :])

    def put(self, name: str, value: Tensor) -> Batch:
        """Return the same with one of its tensors replaced."""
        return self._replace(values={**self.values, name: value})

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the same with all tensors changed."""
        return self._replace(
            values={name: change(each) if isinstance(each, Tensor) else each for name, each in self.values.items()}
        )


def batch_of(x: Given) -> Batch:
    """Sort out what was given.

    Raises:
        TypeError: no tensor in it.
        ValueError: the signal is empty or has no dimension.
    """
    positional = 1 if isinstance(x, Tensor) else 0 if isinstance(x, Mapping) else len(x) if isinstance(x, tuple) else -1
    if positional < 0:
        raise TypeError(
            f"x must be a tensor, a tuple or a dictionary with tensors, got an object of {type(x).__name__}."
        )
    values: dict[str, Any] = (
        {"0": x}
        if isinstance(x, Tensor)
        else dict(x)
        if isinstance(x, Mapping)
        else {str(i): each for i, each in enumerate(x)}
    )
    found = {name: each for name, each in values.items() if isinstance(each, Tensor)}
    floats = [name for name, each in found.items() if each.is_floating_point() and each.dim()]
    signal = next(iter([*floats, *(name for name, each in found.items() if each.dim() > 1), *found]), None)
    if signal is None:
        raise TypeError("x must hold a tensor, the batch to be varied.")
    if not found[signal].dim() or not found[signal].numel():
        raise ValueError(f"x must be a batch, (batch, ...), and not empty; got shape {tuple(found[signal].shape)}.")
    return Batch(values, positional, signal).each(Tensor.detach)


def boundaries(model: nn.Module, batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Yield the boundary inputs with their names, the given one first."""
    yield "as given", batch
    x, put = batch.x, partial(batch.put, batch.signal)
    if x.is_floating_point():
        middle = torch.zeros_like(x)
        middle.view(x.shape[0], -1)[:, x[0].numel() // 2] = 1
        rms = x.double().square().mean().sqrt().clamp(min=1e-30).to(x.dtype)
        yield "silence", put(torch.zeros_like(x))
        yield "ones", put(torch.ones_like(x))
        yield "impulse", put(middle)
        yield "constant", put(torch.full_like(x, 0.5))
        yield "clipped", put((10 * x / rms).clamp(-1, 1))
        yield "rms 1e-6", put(x / rms * 1e-6)
        yield "x 1000", put(x * 1000)
    elif not x.is_complex() and x.dtype is not torch.bool:
        low, high = _ends(model, batch)
        yield "smallest", put(torch.full_like(x, low))
        yield "largest", put(torch.full_like(x, high))
    yield from _companions(batch)
    size = x.shape[0]
    yield "one item", batch.each(lambda each: each[:1] if each.dim() and each.shape[0] == size else each)
    for dim in range(1, x.dim()):
        yield f"length 1 in dimension {dim}", _along(batch, dim, lambda each, at: each.narrow(at, 0, 1), 1)
        longer = _along(batch, dim, lambda each, at: torch.cat([each, each], at), 2 * x.shape[dim])
        yield f"twice the length in dimension {dim}", longer


def _companions(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Vary what comes with the signal: masks of either polarity, lengths."""
    for name, each in batch.values.items():
        if name == batch.signal or not isinstance(each, Tensor) or not _per_item(each, batch.x):
            continue
        if _is_mask(each):
            for value in (1, 0):
                one = each.clone()
                one[0] = value
                yield (
                    f"{name!r} all {bool(value) if each.dtype is torch.bool else value} in one item",
                    batch.put(name, one),
                )
        elif _is_lengths(each, batch.x):
            for value in (0, 1):
                one = each.clone()
                one[0] = value
                yield f"{name!r} is {value} in one item", batch.put(name, one)
            yield f"{name!r} at their longest", batch.put(name, torch.full_like(each, int(each.max())))


def _per_item(each: Tensor, x: Tensor) -> bool:
    return each.dim() > 0 and each.shape[0] == x.shape[0] and each.numel() > 0


def _is_mask(each: Tensor) -> bool:
    if each.dim() < 2 or each.is_floating_point() or each.is_complex():
        return False
    return each.dtype is torch.bool or bool(((each == 0) | (each == 1)).all())


def _is_lengths(each: Tensor, x: Tensor) -> bool:
    whole = not (each.is_floating_point() or each.is_complex() or each.dtype is torch.bool)
    return whole and each.dim() == 1 and x.dim() > 1 and 0 < int(each.max()) <= max(x.shape[1:])


def _along(batch: Batch, dim: int, change: Callable[[Tensor, int], Tensor], new: int) -> Batch:
    """Change the length of the signal in one dimension, and of what has the same length behind the batch dimension."""
    length = batch.x.shape[dim]

    def follow(name: str, each: Any) -> Any:
        if name == batch.signal:
            return change(each, dim)
        if not isinstance(each, Tensor):
            return each
        if _per_item(each, batch.x) and _is_lengths(each, batch.x):
            return (each * new // length).clamp(min=1)
        if each.dim() > 1 and each.shape[0] == batch.x.shape[0] and length > 1:
            for at in [at for at in range(1, each.dim()) if each.shape[at] == length]:
                each = change(each, at)  # (batch, time, time) has the length twice
        return each

    return batch._replace(values={name: follow(name, each) for name, each in batch.values.items()})


def _ends(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """Return the ends of an integer signal's range: of the embedding that reads it, else of what it holds itself."""
    x = batch.x
    ends = [int(x.min()), int(x.max())]

    def look(table: nn.Embedding, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].shape == x.shape and torch.equal(given[0], x):
            ends[:] = 0, table.num_embeddings - 1

    handles = [each.register_forward_pre_hook(look) for each in model.modules() if isinstance(each, nn.Embedding)]
    try:
        with untouched(model.forward), torch.no_grad():
            batch.call(model)
    except Exception:  # the first trial says so
        return ends[0], ends[1]
    finally:
        for handle in handles:
            handle.remove()
    return ends[0], ends[1]
