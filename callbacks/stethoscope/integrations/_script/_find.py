"""Which module is trained, by which optimizers: by what is alive, and by who owns which parameter."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from stethoscope._monitor import Monitor
from stethoscope._tree import unwrap

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Training:
    """What was found.

    Args:
        root: the module to monitor, without DDP and compile wrappers.
        made: whether the root is a container made here, which the script does not know.
        optimizers: that own parameters of it.
        others: optimizers of the script that do not.
        monitor: one that the script has put on it, if it has.
    """

    root: nn.Module
    made: bool
    optimizers: list[Optimizer]
    others: list[Optimizer]
    monitor: Monitor | None


def training_of(called: nn.Module) -> Training | None:
    """Find the training that an outermost call belongs to.

    The root is the called module where it holds all of its optimizer's parameters; else the smallest module that does, such
    as a LightningModule, whose layers are called one by one; else a new container of the modules that share them.

    Args:
        called: in train mode, with gradients on.

    Returns:
        None where no optimizer owns a parameter of the module (yet).
    """
    optimizers, modules, monitors = _alive()
    mine = _ids(called.parameters())
    first = next((each for each in optimizers if parameters_of(each) & mine), None)
    if first is None:
        return None
    owned = {id(each) for module in modules for each in module._parameters.values()}  # noqa: SLF001 - one pass, no recursion
    wanted = parameters_of(first) & owned
    root = unwrap(called) if wanted <= mine else _smallest(wanted, modules)
    made = root is None
    root = _container(wanted, modules) if root is None else root
    inside = _ids(root.parameters())
    at_work = [each for each in monitors if not each._closed]  # noqa: SLF001 - of our own kind
    monitor = next((each for each in at_work if _ids(each.model.parameters()) & inside), None)
    of_root = [each for each in optimizers if parameters_of(each) & inside]
    return Training(root, made, of_root, [each for each in optimizers if each not in of_root], monitor)


def parameters_of(optimizer: Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


def _ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(each) for each in parameters}


def _alive() -> tuple[list[Optimizer], list[nn.Module], list[Monitor]]:
    """All optimizers, modules and monitors; an optimizer that wraps another one, as Accelerate's do, is left out."""
    optimizers: dict[int, Optimizer] = {}
    modules: list[nn.Module] = []
    monitors: list[Monitor] = []
    for each in gc.get_objects():
        kind = type(each)  # isinstance would ask objects for their __class__, and some compute it
        if issubclass(kind, nn.Module):
            modules.append(each)
        elif issubclass(kind, Optimizer) and each.__dict__.get("_optimizer_step_pre_hooks") is not None:
            if not kind.__module__.startswith(("lightning", "pytorch_lightning")):
                optimizers[id(each.param_groups)] = each
        elif kind is Monitor:
            monitors.append(each)
    return list(optimizers.values()), modules, monitors


def _smallest(wanted: set[int], modules: list[nn.Module]) -> nn.Module | None:
    sizes = {id(each): _ids(each.parameters()) for each in modules if each._modules}  # noqa: SLF001 - leaves own too little
    holders = [each for each in modules if wanted <= sizes.get(id(each), set())]
    # of a wrapper and what it wraps, the inner one has as many parameters and fewer modules
    return min(holders, key=lambda each: (len(sizes[id(each)]), sum(1 for _ in each.modules())), default=None)


def _container(wanted: set[int], modules: list[nn.Module]) -> nn.Module:
    touched = [each for each in modules if wanted & _ids(each.parameters())]
    inner = {id(child) for each in touched for child in each.modules() if child is not each}
    named = nn.ModuleDict()
    for module in (unwrap(each) for each in touched if id(each) not in inner):
        name = type(module).__name__
        number = sum(1 for known in named if known.partition("_")[0] == name)
        named[f"{name}_{number + 1}" if number else name] = module
    return named
