"""Calls a model again and again as if each call were the first, and leaves it as it was found."""

from __future__ import annotations

import functools
import inspect
import random
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
_WIDE |= {torch.complex32: torch.complex128, torch.complex64: torch.complex128}


class Subject(NamedTuple):
    """What is audited: `call(*arguments)`, and the module behind it, where there is one."""

    call: Callable[..., Any]
    module: nn.Module | None


def resolve(model: Any, forward: Any, arguments: int) -> Subject:
    """Find out what to call and which module it runs.

    Args:
        model: module, bound method or function; a function's modules are found in what it refers to.
        forward: None, the name of a method, or a callable taking `(*inputs)` or `(model, *inputs)`.
        arguments: how many inputs there are.
    """
    if not callable(model) and forward is None:
        raise TypeError(
            f"`model` must be callable, got {type(model).__name__}. Name the method to call: forward='...'."
        )
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
    module = _module_of(model)
    if forward is None:
        return Subject(model, module)
    if isinstance(forward, str):
        if not callable(getattr(model, forward, None)):
            raise ValueError(  # noqa: TRY004  # the name is wrong, not its type
                f"{type(model).__name__} has no method {forward!r}. Give the name of one, or a callable."
            )
        return Subject(getattr(model, forward), module)
    if not callable(forward):
        raise TypeError(f"`forward` must be a method's name or a callable, got {type(forward).__name__}.")
    try:
        inspect.signature(forward).bind(*range(arguments))
    except (TypeError, ValueError):
        return Subject(lambda *inputs: forward(model, *inputs), module)
    return Subject(forward, module)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module without compile, DDP and DataParallel: hooks do not fire inside compiled code."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]  # set by torch.compile # noqa: SLF001
        else:
            return module


def _module_of(model: Any) -> nn.Module | None:
    """The module behind a callable: itself, its owner, what its closure, its arguments or its attributes hold."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, functools.partial):
        seen = {"function": model.func, **{f"argument{i}": arg for i, arg in enumerate(model.args)}, **model.keywords}
        seen["function"] = _module_of(model.func)
    elif inspect.isfunction(model):
        variables = inspect.getclosurevars(model)
        seen = {**variables.globals, **variables.nonlocals}
    elif inspect.ismethod(model):
        return _module_of(model.__self__)
    else:
        seen = getattr(model, "__dict__", {})
    found = {name: value for name, value in seen.items() if isinstance(value, nn.Module)}
    return nn.ModuleDict(found) if len(found) > 1 else next(iter(found.values()), None)


class BudgetError(Exception):
    """No forward pass is left."""


class Runs:
    """Counts and repeats calls: before each one the RNG, buffers and parameters are what they were at the start.

    Args:
        subject: what to call.
        limit: largest number of forward passes, None for no limit.
    """

    def __init__(self, subject: Subject, limit: int | None) -> None:
        self.subject = subject
        self.limit = limit
        self.passes = 0
        self._wide: _Widening | None = None
        self._modules = list(subject.module.modules()) if subject.module is not None else []
        # Flags, and what modules keep between calls: caches, hidden states, counters.
        self._attributes = [dict(module.__dict__) for module in self._modules]
        self._buffers = [(module, dict(module._buffers)) for module in self._modules]  # noqa: SLF001
        if any(nn.parameter.is_lazy(tensor) for tensor in self._tensors()):
            raise ValueError("The model has lazy parameters without a shape yet. Call it once on x before the audit.")
        if any(tensor.is_inference() for tensor in self._tensors()):
            raise ValueError(
                "The model was made in torch.inference_mode(), which forbids to set it back. Make it outside."
            )
        self._values = [_Value(tensor) for tensor in self._tensors()]
        self._random = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002  # the legacy generator is the one that models draw from
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @property
    def left(self) -> float:
        """Forward passes that may still be made."""
        return float("inf") if self.limit is None else self.limit - self.passes

    def __call__(self, arguments: tuple[Any, ...], *, fresh: bool = True, grad: bool = False) -> Any:
        """Call once. `fresh=False` lets the RNG go on from where it is."""
        if self.left < 1:
            raise BudgetError(f"The budget of {self.limit} forward passes is spent.")
        self.passes += 1
        self._restore_tensors(thorough=False)
        if fresh:
            self._restore_random()
        with torch.set_grad_enabled(grad), self._wide or nullcontext():
            return self.subject.call(*arguments)

    @property
    def widens(self) -> bool:
        """Whether the modules let their tensors be swapped: scripted ones do not."""
        return all(isinstance(module._buffers, dict) for module in self._modules)  # noqa: SLF001

    @property
    def narrowed(self) -> bool:
        """Whether, within `wide`, an operation has turned 64-bit numbers into shorter ones: then it is no float64 run."""
        return self._wide is not None and self._wide.narrowed

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Leave attributes, buffers, parameters and RNG as they were, whatever happens."""
        try:
            yield
        finally:
            for module, attributes in zip(self._modules, self._attributes, strict=True):
                module.__dict__.clear()
                module.__dict__.update(attributes)
            self._restore_tensors(thorough=True)
            self._restore_random()

    @contextmanager
    def mode(self, name: str) -> Iterator[None]:
        """Put the whole model into `"eval"` or `"train"` mode."""
        if self.subject.module is not None:
            self.subject.module.train(name == "train")
        yield

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Compute in float64: parameters, buffers and tensor attributes are swapped, not written, and swapped back.

        What a function made itself, or holds beside any module, is widened where it is used.
        """
        kept: list[tuple[Any, dict[str, Tensor]]] = []
        flat: list[tuple[nn.RNNBase, list[Any]]] = []
        values, buffers = self._values, self._buffers
        try:
            for module in self._modules:
                stores: tuple[Any, ...] = (module._parameters, module._buffers, module.__dict__)  # noqa: SLF001
                for members in stores:
                    narrow = {k: v for k, v in members.items() if isinstance(v, Tensor) and v.dtype in _WIDE}
                    kept.append((members, narrow))
                    members.update({k: v.detach().to(_WIDE[v.dtype]) for k, v in narrow.items()})
                if isinstance(module, nn.RNNBase):
                    names = module._flat_weights_names  # noqa: SLF001
                    flat.append((module, module._flat_weights))  # noqa: SLF001
                    module._flat_weights = [module._parameters[name] for name in names]  # noqa: SLF001
            self._buffers = [(module, dict(module._buffers)) for module in self._modules]  # noqa: SLF001
            self._values = [_Value(tensor) for tensor in self._tensors()]
            self._wide = _Widening()
            yield
        finally:
            self._wide = None
            for members, narrow in kept:
                members.update(narrow)
            for module, weights in flat:
                module._flat_weights = weights  # noqa: SLF001
            self._values, self._buffers = values, buffers

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor | None] = []
        found += [tensor for module in self._modules for tensor in module._parameters.values()]  # noqa: SLF001
        found += [tensor for _, buffers in self._buffers for tensor in buffers.values()]
        return list({id(tensor): tensor for tensor in found if tensor is not None}.values())

    def _restore_tensors(self, *, thorough: bool) -> None:
        for module, kept in self._buffers:
            # Scripted modules offer a view only; there, buffers cannot be replaced by assignment either.
            if isinstance(module._buffers, dict):  # noqa: SLF001
                module._buffers.clear()  # noqa: SLF001
                module._buffers.update(kept)  # noqa: SLF001
        for value in self._values:
            value.restore(thorough=thorough)

    def _restore_random(self) -> None:
        random.setstate(self._random)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class _Value:
    """What one parameter or buffer held."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._kept = tensor.detach().clone()
        self._version = tensor._version  # noqa: SLF001  # torch's own count of writes

    def restore(self, *, thorough: bool) -> None:
        """Write it back if it was written; `thorough` also sees what was written behind autograd's back (`.data`)."""
        written = self._tensor._version != self._version  # noqa: SLF001
        if written or (thorough and not torch.equal(self._tensor, self._kept)):
            with torch.no_grad():
                self._tensor.copy_(self._kept)
            self._version = self._tensor._version  # noqa: SLF001


class _Widening(TorchFunctionMode):
    """Gives every operation float64 for shorter numbers, except for what it writes into.

    A constant that no module owns would otherwise keep its float32, and `rfft(constant)` its rounding, which a float64
    run takes for a leak. What operations make is widened at once, so that nothing short is there to be written into.
    """

    def __init__(self) -> None:
        super().__init__()
        self.narrowed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on wide arguments and widen what it made."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute such as .data or .dtype: nothing is computed
            return func(*args, **kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
            args, kwargs = (*args[:1], *_widened(args[1:])), _widened(kwargs)
            written = args[0]
        else:
            written = kwargs.get("out")
            args, kwargs = _widened(args), {k: v if k == "out" else _widened(v) for k, v in kwargs.items()}
        made = func(*args, **kwargs)
        given = [value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        results = [value.dtype for value in (made, written) if isinstance(value, Tensor)]
        self.narrowed |= any(d in _WIDE for d in results) and any(d in _WIDE.values() for d in given)
        return made if written is not None else _widened(made)


def _widened(value: Any) -> Any:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(_WIDE[tensor.dtype]) if tensor.dtype in _WIDE else tensor

    return tree_map_only(Tensor, wide, value)
