"""One decision for all ranks: ranks that share their gradients must all write in a step, or none of them."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from stethoscope import _gloo
from stethoscope._flattened import is_flattened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from stethoscope._protocols import Run

TIMEOUT = timedelta(seconds=60)
"""For other ranks to come to a decision. Their gradients have just been averaged together, so they are milliseconds away."""


class Agreement:
    """Asks all ranks at once, over a connection of its own, and waits for them.

    Args:
        model: as the monitor was given it, with its wrappers.
        run: of this rank.
        meet: returns the store in which the ranks meet, or None.

    Attributes:
        split: whether parts of the model's tensors lie on other ranks.
        shared: whether the ranks train one model. Without it each rank decides for itself.
    """

    def __init__(self, model: nn.Module, run: Run, meet: Callable[[], Any]) -> None:
        self.split = bool(run.shards) or is_flattened(model)
        self.shared = self.split or isinstance(model, DistributedDataParallel)
        self._rank, self._ranks, self._meet = run.rank, run.world_size, meet
        self._group: Any = None

    @property
    def several(self) -> bool:
        """Whether there are other ranks to ask."""
        return self.shared and self._ranks > 1

    def first(self, bad: bool) -> int | None:
        """Return the lowest rank that says `bad`, the same on all ranks; None where all is well.

        Raises:
            RuntimeError: not all ranks have come in time.
        """
        if not self.several:
            return self._rank if bad else None
        if self._group is None:
            store = self._meet()
            if store is None:
                raise RuntimeError("torch.distributed had no process group when the training began")
            self._group = _gloo.connect(store, "agree", self._rank, self._ranks, TIMEOUT)
        lowest = torch.tensor([self._rank if bad else self._ranks], device="cpu")
        try:
            _gloo.combine(self._group, lowest, dist.ReduceOp.MIN).wait()
        except RuntimeError as error:
            self.shared = False
            raise RuntimeError(
                f"the ranks have come to no common decision within {TIMEOUT.total_seconds():g} s, since one of them has ended or "
                "has no guard: give the monitor of every rank the same guard="
            ) from error
        answer = int(lowest.item())
        return answer if answer < self._ranks else None

    def alone(self) -> AbstractContextManager[object]:
        """What runs inside runs on this rank alone: a collective in it raises, for others would never take part."""
        return _NoCollectives() if self._ranks > 1 else nullcontext()  # type: ignore[no-untyped-call]  # torch's constructor


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises instead of waiting for other ranks (SyncBatchNorm, a contrastive loss that gathers)."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            raise RuntimeError(f"{func.overloadpacket} needs the other ranks, which are not running the step again")
        return func(*args, **(kwargs or {}))
