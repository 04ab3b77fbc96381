"""The facts about a run that its sinks are told."""

from __future__ import annotations

import os
import platform
import uuid
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from stethoscope._protocols import Run
from stethoscope._shards import parts
from stethoscope._tree import plain

if TYPE_CHECKING:
    from torch import nn


def new_run(model: nn.Module, planned_steps: int | None, every: int) -> Run:
    """Gather the facts about a run that begins now. Its name is drawn by the operating system, not by a random state."""
    now = datetime.now(timezone.utc)
    rank, world_size = _rank()
    return Run(
        id=f"{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}",
        started=now.isoformat(timespec="seconds"),
        modules=tuple((plain(name), type(module).__name__) for name, module in model.named_modules()),
        planned_steps=planned_steps,
        every=every,
        versions=versions(),
        rank=rank,
        world_size=world_size,
        shards=_shards_of(model),
    )


def _rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _shards_of(model: nn.Module) -> dict[str, int]:
    numbers = {plain(name): parts(parameter) for name, parameter in model.named_parameters()}
    most = max(numbers.values(), default=1)
    return {"": most} | {name: n for name, n in numbers.items() if 1 < n < most} if most > 1 else {}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a step computes."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("stethoscope", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
