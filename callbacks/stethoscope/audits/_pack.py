"""Nested values as strict JSON beside a flat dictionary of tensors, and back, without running anything that they say.

A node is `{"kind": ...}`; see `Packer.pack` for the kinds. What neither JSON nor safetensors can hold is left out, and said so.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stethoscope._record import strict_number
from stethoscope._secrets import without_secrets
from stethoscope._tree import size_of

if TYPE_CHECKING:
    from stethoscope._record import JSON

DEPTH = 32
"""Containers in containers; deeper ones are left out, or refused."""
_TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}
_DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
_DTYPES |= {torch.complex64, torch.complex128}
_ARRAYS = {str(each).removeprefix("torch.") for each in _DTYPES}


class Packer:
    """Takes values apart.

    Args:
        max_bytes: of all tensors together; what does not fit is left out.
    """

    def __init__(self, max_bytes: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.left_out: list[str] = []
        self._room = max_bytes
        self._names: dict[int, tuple[str, Tensor]] = {}  # the tensor itself, so that its id is not used again

    def fits(self, size: int) -> bool:
        """Whether so many bytes are left."""
        return size <= self._room

    def pack(self, value: Any, path: str, depth: int = DEPTH) -> JSON:
        """Return the node of a value; `path` names its tensors."""
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, str):
            return self._text(value, path)
        if value is None or isinstance(value, bool | int):
            return {"kind": "value", "value": value}
        if isinstance(value, float):
            return (
                {"kind": "value", "value": value}
                if math.isfinite(value)
                else {"kind": "float", "value": strict_number(value)}
            )
        if isinstance(value, torch.dtype):
            return {"kind": "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, np.ndarray | np.generic) and str(value.dtype) in _ARRAYS:
            return {"kind": "array", "value": self._tensor(torch.as_tensor(np.asarray(value).copy()), path)}
        if not depth:
            return self._leave_out(path, "is nested too deep")
        if isinstance(value, PackedSequence):
            parts = {name: self.pack(getattr(value, name), f"{path}.{name}", depth - 1) for name in value._fields}
            return {"kind": "packed", "fields": parts}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            names: dict[str, Any] = dict(zip(value._fields, value, strict=True))
            return {"kind": "named", "fields": self._mapping(names, path, depth)}
        if isinstance(value, tuple | list):
            items = [self.pack(each, f"{path}.{i}", depth - 1) for i, each in enumerate(value)]
            return {"kind": "tuple" if isinstance(value, tuple) else "list", "items": items}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {"kind": "dict", "fields": self._mapping(value, path, depth)}
            return self._leave_out(path, "is a mapping with keys that are not text")
        if is_dataclass(value) and not isinstance(value, type):
            held = {each.name: getattr(value, each.name, None) for each in fields(value)}
            return {"kind": "object", "fields": self._mapping(held, path, depth)}
        return self._leave_out(path, f"is an object of {type(value).__name__}")

    def _mapping(self, value: Mapping[str, Any], path: str, depth: int) -> dict[str, JSON]:
        return {key: self.pack(each, f"{path}.{key}", depth - 1) for key, each in value.items()}

    def _text(self, text: str, path: str) -> JSON:
        last = path.rpartition(".")[2]
        if without_secrets(f"{last}={text}") != f"{last}={text}":
            return self._leave_out(path, "looks like a secret")
        return {"kind": "value", "value": text}

    def _tensor(self, tensor: Tensor, path: str) -> JSON:
        if id(tensor) in self._names:
            return {"kind": "tensor", "name": self._names[id(tensor)][0], "grad": tensor.requires_grad}
        if tensor.is_nested:
            items = [self._tensor(part, f"{path}.{i}") for i, part in enumerate(tensor.detach().unbind())]
            return {"kind": "nested", "items": items, "jagged": tensor.layout is torch.jagged}
        # DTensor and other subclasses hold their values elsewhere
        if (
            type(tensor) not in _PLAIN
            or tensor.layout is not torch.strided
            or tensor.dtype not in _DTYPES
            or tensor.is_meta
        ):
            kind = f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, {tensor.device.type}"
            return self._leave_out(path, f"is a tensor that the file cannot hold ({kind})")
        size = size_of(tensor)
        if size > self._room:
            return self._leave_out(path, f"has {size} bytes, and {self._room} were left")
        self._room -= size
        kept = tensor.detach()
        if kept.is_complex():
            kept = torch.view_as_real(kept.resolve_conj())
        # a copy of its own, as the file holds no views
        self.tensors[path] = kept.resolve_neg().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._names[id(tensor)] = path, tensor
        return {"kind": "tensor", "name": path, "grad": tensor.requires_grad, "complex": tensor.is_complex()}

    def _leave_out(self, path: str, why: str) -> JSON:
        self.left_out.append(f"{path} {why}")
        return {"kind": "left out", "why": why}


def unpack(node: JSON, tensors: Mapping[str, Tensor], depth: int = 2 * DEPTH) -> Any:
    """Undo `Packer.pack`. Dataclasses come back as plain objects with the same attributes; what was left out as None.

    Raises:
        ValueError: not such a node.
    """
    if not isinstance(node, dict) or not depth:
        raise ValueError(f"expected a value's description, got {str(node)[:80]!r}")
    try:
        return _unpack(node, tensors, depth)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{str(node)[:80]!r}: {type(error).__name__}: {error}") from error


def _unpack(node: Mapping[str, Any], tensors: Mapping[str, Tensor], depth: int) -> Any:
    kind = node["kind"]
    if kind == "tensor":
        tensor = tensors[node["name"]]
        tensor = torch.view_as_complex(tensor) if node.get("complex") is True else tensor
        floating = tensor.is_floating_point() or tensor.is_complex()
        return tensor.detach().clone().requires_grad_(node["grad"] is True and floating)
    if kind == "value":
        if not (node["value"] is None or isinstance(node["value"], bool | int | float | str)):
            raise ValueError(f"{str(node)[:80]!r} holds no plain value")
        return node["value"]
    if kind == "float":
        return _TEXTS[node["value"]]
    if kind == "dtype":
        found = getattr(torch, node["value"])
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{node['value']!r} is no dtype")
        return found
    if kind == "array":
        return unpack(node["value"], tensors, depth - 1).numpy()
    if kind == "left out":
        return None
    if kind in ("tuple", "list", "nested"):
        items = [unpack(each, tensors, depth - 1) for each in node["items"]]
        if kind == "nested":
            layout = torch.jagged if node["jagged"] is True else torch.strided
            return torch.nested.nested_tensor(items, layout=layout)
        return tuple(items) if kind == "tuple" else items
    held = {str(key): unpack(each, tensors, depth - 1) for key, each in node["fields"].items()}
    if kind == "dict":
        return held
    if kind == "packed":
        return PackedSequence(**held)
    if kind == "object":
        return SimpleNamespace(**held)
    if kind == "named":
        return namedtuple("Named", held)(**held)  # noqa: PYI024 - its names are the file's
    raise ValueError(f"unknown kind {str(kind)[:80]!r}")


def printable(text: str) -> str:
    """Return a text of the bundle as it can be shown: control characters, which could drive a terminal, become escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[:2000])
