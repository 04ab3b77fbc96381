"""Connections between the ranks on the host, beside those of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from datetime import timedelta

    from torch import Tensor

_c10d: Any = dist  # much of what is there has no types


def connect(store: Any, name: str, rank: int, ranks: int, timeout: timedelta) -> Any:
    """Return a process group of our own, which connects when it is first used.

    Args:
        store: where the ranks meet.
        name: of the group.
        rank: of this process.
        ranks: how many there are.
        timeout: of what crosses over it.

    Raises:
        RuntimeError: torch was built without gloo.
    """
    if not dist.is_gloo_available():
        raise RuntimeError("this build of torch has no gloo, over which numbers cross on the host")
    gloo = _c10d.ProcessGroupGloo
    options = gloo._Options()  # noqa: SLF001  # without it, 1,024 ranks would open 1,023 connections each
    options._devices = [gloo.create_default_device(lazy_init=True)]  # noqa: SLF001
    options._timeout = timeout  # noqa: SLF001
    return gloo(_c10d.PrefixStore(name, store), rank, ranks, options)


def combine(group: Any, tensor: Tensor, operation: Any) -> Any:
    """Begin to combine a tensor over ranks, in place; return what to wait for.

    Args:
        group: from `connect`.
        tensor: on the host.
        operation: one of `torch.distributed.ReduceOp`.
    """
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    return group.allreduce([tensor], options)
