"""Finds the source line, within one module's own forward, where an output starts to depend on the future."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from stethoscope.audits._causality._axes import tensors
from stethoscope.audits._causality._culprit import Slot

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from typing_extensions import Self

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_UNSET = ("empty", "new_empty")
"""Operations that return whatever was in memory: it differs from run to run and says nothing."""


class Line(NamedTuple):
    """An operation and the line that asked for it."""

    operation: str
    source: str
    code: str

    def __str__(self) -> str:
        return f"{self.source}: {self.code}" if self.code else self.source


class Operations(TorchFunctionMode):
    """Looks at what each operation returns, in one call of one module, outside of the modules within it.

    Args:
        look: called as `look(slot, tensor)`, the slot's call being the number of the operation.
        module: the module; None to look all the time.
        call: which of its calls.
    """

    def __init__(self, look: Callable[[Slot, Tensor], Any], module: nn.Module | None, call: int) -> None:
        super().__init__()
        self.seen: list[tuple[Line, dict[Slot, Any]]] = []
        self._look = look
        self._module = module
        self._call = call
        self._calls = 0
        self._depth = 0 if module is None else -1
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Start looking."""
        if self._module is not None and not isinstance(self._module, torch.jit.ScriptModule):
            self._handles = [
                self._module.register_forward_pre_hook(self._enter, prepend=False),
                self._module.register_forward_hook(self._leave, always_call=True),
            ]
            for child in [m for m in list(self._module.modules())[1:] if not isinstance(m, torch.jit.ScriptModule)]:
                self._handles.append(child.register_forward_pre_hook(self._down))
                self._handles.append(child.register_forward_hook(self._up, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *error: object) -> None:
        """Stop and remove every hook."""
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returned, or at what it wrote into."""
        result = func(*args, **(kwargs or {}))
        if self._depth == 0:
            name = (resolve_name(func) or getattr(func, "__name__", "?")).rpartition(".")[2]
            made = args[0] if name == "__setitem__" else result
            looked = {}
            number = len(self.seen)
            for path, tensor in tensors(made) if not name.startswith(_UNSET) else ():
                slot = Slot(name, number, "out", path)
                looked[slot] = self._look(slot, tensor)
            if looked:
                self.seen.append((_line(name), looked))
        return result

    def _enter(self, *_: Any) -> None:
        if self._calls == self._call:
            self._depth = 0
        self._calls += 1

    def _leave(self, *_: Any) -> None:
        self._depth = -1

    def _down(self, *_: Any) -> None:
        if self._depth >= 0:
            self._depth += 1

    def _up(self, *_: Any) -> None:
        if self._depth > 0:
            self._depth -= 1


def _line(name: str) -> Line:
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001  # the caller's line is the answer
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)):
            code = linecache.getline(file, frame.f_lineno).strip()
            # The last parts of the path are enough to find it, and do not tell whose machine it is.
            return Line(name, f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}", code)
        frame = frame.f_back
    return Line(name, "", "")
