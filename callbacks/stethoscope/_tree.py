"""Names of modules without wrappers, and the tensors inside of what modules take and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_WRAPPERS = ("_orig_mod", "_forward_module", "module")
"""Where torch.compile, Fabric and DDP, DataParallel or EMA keep the model that they wrap."""

_WRAPPER_TYPES = {
    "OptimizedModule",
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "_FabricModule",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside of DDP, FSDP, DataParallel, Fabric and torch.compile wrappers.

    Args:
        model: any module.

    Examples:
        >>> unwrap(nn.DataParallel(nn.Linear(2, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    while type(model).__name__ in _WRAPPER_TYPES:
        inner = next((child for name, child in model.named_children() if name in _WRAPPERS), None)
        if inner is None:
            break
        model = inner
    return model


def has_no_forward(module: nn.Module) -> bool:
    """Whether a module has no forward of its own, like `ModuleList` and models that are called by another method."""
    # of a ScriptModule's class, asking for `forward` raises; its own is there all the same
    return getattr(type(module), "forward", None) is nn.Module.forward


def callable_parts(model: nn.Module) -> list[nn.Module]:
    """Return what may be called from outside without the model: its children, and those of lists without a forward."""
    found = []
    for child in model.children():
        found += callable_parts(child) if has_no_forward(child) else [child]
    return found


def plain(name: str) -> str:
    """Return a module or parameter name without the segments that wrappers of submodules add.

    Examples:
        >>> plain("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    if "_orig_mod" not in name and "_fsdp_wrapped_module" not in name and "_checkpoint_wrapped_module" not in name:
        return name
    wrapped = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrapped)


def tensors(value: object, path: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Find the tensors in a nested value, with their paths, in order.

    Understands tensors, tuples, named tuples, lists, mappings, dataclasses (so also `ModelOutput`) and
    `PackedSequence` (its data). Everything else holds none.

    Args:
        value: what a module took or returned, or a batch.
        path: prefix of the paths, without a final dot.
        depth: how many containers deep to look.

    Examples:
        >>> import torch
        >>> [path for path, _ in tensors({"logits": torch.ones(2), "states": (torch.ones(1), None)})]
        ['logits', 'states.0']
    """
    if isinstance(value, Tensor):
        yield path, value
    elif depth and not isinstance(value, str):
        dot = f"{path}." if path else ""
        if isinstance(value, PackedSequence):
            yield f"{dot}data", value.data
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from tensors(inner, f"{dot}{key}", depth - 1)
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                yield from tensors(inner, f"{dot}{i}", depth - 1)
        elif is_dataclass(value) and not isinstance(value, type):
            for each in fields(value):
                yield from tensors(getattr(value, each.name, None), f"{dot}{each.name}", depth - 1)


def size_of(tensor: Tensor) -> int:
    """Return the size of a tensor's values in bytes, those of a view alone.

    Examples:
        >>> import torch
        >>> size_of(torch.ones(2, 3))
        24
    """
    return tensor.numel() * tensor.element_size()
