"""What all our hooks have in common: which modules take them, and that a copy of them does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.jit._script import ScriptModule
from torch.jit._trace import TopLevelTracedModule

if TYPE_CHECKING:
    from torch import nn


class Nothing:
    """A hook that does nothing: what is left of ours in a deep copy (EMA) or a pickle of an observed model."""

    def __call__(self, *args: object) -> None:
        """Return None, so that nothing is replaced."""


class Hook:
    """A hook that stays with the model it was put on."""

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
