"""What loaded and missing tensors do to a model's output."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


class Effect(NamedTuple):
    """Distances between outputs on one example, relative to the norm of the first of the two.

    Args:
        loaded: from the untrained model's output to that with the weights loaded. Near 0: loading did nothing visible.
        missing: from the output with the weights loaded to that with other untrained values in the missing tensors. Near
            0: what is missing does not reach the output. Near 1: chance decides.
    """

    loaded: float
    missing: float


def effect(model: nn.Module, fitting: Mapping[str, Tensor], missing: Sequence[str], example: Any) -> Effect:
    """Run the example through copies of the model; the model itself and the random generators stay as they are."""
    with torch.random.fork_rng(), torch.no_grad():
        # what hooks computed in the last forward (the old weight norm) refuses to be copied
        held = (
            value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)
        )
        trial = copy.deepcopy(model, {id(value): value.detach().clone() for value in held if not value.is_leaf}).eval()
        untrained = _run(trial, example)
        trial.load_state_dict(dict(fitting), strict=False)
        loaded = _run(trial, example)
        state = trial.state_dict()
        for key in missing:
            state[key].copy_(_other(state[key]))
        moved = _run(trial, example)
    return Effect(_distance(untrained, loaded), _distance(loaded, moved))


def _run(model: nn.Module, example: Any) -> Tensor:
    torch.manual_seed(0)  # generative models draw noise: the same for every run
    if isinstance(example, Mapping):
        output = model(**example)
    else:
        output = model(*example) if isinstance(example, tuple) else model(example)
    parts = [tensor.detach().double().flatten().cpu() for tensor in _tensors(output)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() or output.is_complex():
            yield torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _other(tensor: Tensor) -> Tensor:
    """Another value that is as untrained: the same numbers in reverse; constants, which that leaves as they are, moved by a tenth."""
    if not tensor.is_floating_point():
        return tensor
    reversed_ = tensor.flatten().flip(0).reshape(tensor.shape)
    if not torch.equal(reversed_, tensor):
        return reversed_
    signs = torch.ones_like(tensor).flatten()
    signs[1::2] = -1
    return tensor * (1 + 0.1 * signs.reshape(tensor.shape)) + 0.1 * (tensor == 0) * signs.reshape(tensor.shape)


def _distance(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return float("inf")
    norm = float(first.norm())
    change = float((first - second).norm())
    return change / norm if norm > 0 else (0.0 if change == 0 else float("inf"))
