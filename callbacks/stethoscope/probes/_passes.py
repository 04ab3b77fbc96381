"""What counts as a pass of the model that a probe may read."""

from __future__ import annotations

import torch

from stethoscope._aside import is_aside

MAX_CALLS = 16
"""Calls of one module within one pass that are told apart; later ones count with the last of them."""


def replaying() -> bool:
    """Whether modules run for another reason than a forward pass that can be read."""
    return (
        is_aside()
        # activation checkpointing runs the forward again inside of backward
        or torch._C._current_graph_task_id() != -1  # noqa: SLF001
        # tensors inside of torch.func transforms have no values to write into our buffers
        or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or torch._C._get_tracing_state() is not None  # noqa: SLF001
    )
