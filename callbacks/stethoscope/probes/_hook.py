"""What all our hooks have in common: which modules take them, and that a copy of them does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._C import _is_tracing
from torch.compiler import is_compiling
from torch.jit._script import ScriptModule
from torch.jit._trace import TopLevelTracedModule

if TYPE_CHECKING:
    from torch import nn


def is_traced() -> bool:
    """Whether a call is made to be written down: by torch.compile, by torch.jit.trace or by what uses it, such as add_graph.

    What a hook computes in it would become part of the graph.
    """
    return is_compiling() or _is_tracing()


class Nothing:
    """A hook that does nothing: what is left of ours in a deep copy (EMA) or a pickle of an observed model."""

    def __call__(self, *args: object) -> None:
        """Return None, so that nothing is replaced."""


class Hook:
    """A hook that stays with the model it was put on.

    One that is removed while torch goes through the hooks of its module is still called, and without `kwargs`, since how a hook is to be
    called is asked late: then it does nothing.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: object) -> Nothing:
        return Nothing()

    def __copy__(self) -> Nothing:
        return Nothing()

    def __reduce__(self) -> tuple[type[Nothing], tuple[()]]:
        return Nothing, ()


def takes_hooks(module: nn.Module) -> bool:
    """Whether a module calls Python hooks: a scripted one refuses to take any, parts of a traced one never call theirs."""
    return not isinstance(module, ScriptModule) or isinstance(module, TopLevelTracedModule)
