"""The global random states that a training draws from, taken and put back together."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class RandomState(NamedTuple):
    """States of Python's `random`, NumPy's global generator and torch's generators.

    Args:
        python: of `random.getstate()`.
        numpy: of `numpy.random.get_state()`.
        torch: of the CPU's generator.
        cuda: of each device's.
    """

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    cuda: tuple[tuple[torch.device, Tensor], ...] = ()

    def put(self) -> None:
        """Make them the current ones."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - the global state is what models draw from
        torch.set_rng_state(self.torch)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)


def random_state(devices: Sequence[torch.device] = ()) -> RandomState:
    """Take the current ones; of CUDA, those of `devices`. Costs 60 us, most of it for NumPy's."""
    cuda = tuple((device, torch.cuda.get_rng_state(device)) for device in devices)
    return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002 - see put
