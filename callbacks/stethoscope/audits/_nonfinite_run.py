"""One run of forward, loss and backward under a trace, and the model as it was afterwards."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stethoscope._tree import plain, tensors
from stethoscope.audits._nonfinite_tensor import flags, samples, storage
from stethoscope.audits._nonfinite_trace import NONE, Birth, Births, Place, Trace
from stethoscope.audits._untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from stethoscope.audits._nonfinite_trace import Kind, Phase


@dataclass(frozen=True)
class Task:
    """What to run.

    Args:
        model: whose modules name places.
        call: the forward pass.
        args, kwargs: its arguments; a run gets copies.
        loss: called with the output, a tensor, or None.
        whole: `call` computes the loss as well: what runs after a call of `model` belongs to the loss.
    """

    model: nn.Module
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Any] | Tensor | None = None
    whole: bool = False


@dataclass(frozen=True)
class Repair:
    """What to make finite in a run, to see whether the rest goes wrong without it.

    Args:
        operations: indices of operations.
        inputs: whether to repair the inputs.
        weights: tensors of the model, and what they hold in this run.
    """

    operations: frozenset[int] = frozenset()
    inputs: bool = False
    weights: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(eq=False)
class Outcome:
    """What a run has shown.

    Args:
        births: all of them.
        phase: where it went wrong: what the model returned, the loss, a gradient; None if nowhere.
        culprits: births that reached it.
        gradients: parameters whose gradient is not finite.
        state: buffers and parameters that the run made non-finite, with their births.
        error: what the model or the loss raised.
        batch: batch size, where known.
        samples: indices in the batch that are not finite in what the model returned.
        operations: how many were run.
    """

    births: list[Birth]
    phase: Phase | None = None
    culprits: Births = NONE
    gradients: list[str] = field(default_factory=list[str])
    state: dict[str, Births] = field(default_factory=dict[str, Births])
    error: Exception | None = None
    batch: int | None = None
    samples: tuple[int, ...] = ()
    operations: int = 0

    @property
    def wrong(self) -> bool:
        """Whether anything that counts is not finite: what came out, or what stays in the model."""
        return self.phase is not None or bool(self.state)


def run(task: Task, repair: Repair | None = None) -> Outcome:
    """Run once and look; parameters, buffers, gradients, training flags and random states are put back."""
    repair = repair or Repair()
    graph = task.loss is not None or torch.is_grad_enabled()
    functions: list[Any] = [partial(task.model), task.call]
    if task.loss is not None and not isinstance(task.loss, Tensor):
        functions.append(task.loss)
    with untouched(*functions), _attributes(task.model), _eager(task.model), torch.set_grad_enabled(graph):
        for tensor, value in repair.weights:
            tensor.data.copy_(value)
        for parameter in task.model.parameters():
            parameter.grad = None
        args, kwargs = _copies(task.args, repair), _copies(dict(task.kwargs), repair)
        return _Run(task, args, kwargs, repair).outcome


class _Run:
    """The state of one run."""

    def __init__(self, task: Task, args: Any, kwargs: Any, repair: Repair) -> None:
        self._task = task
        self._stack = _Stack(task.model)
        self._bad_before: set[str] = set()
        named = [*_named(args), *_named(kwargs)]
        batch = _batch_size(named)
        self._trace = Trace(
            self._stack.top, self._owner, batch=batch, heal=repair.operations, keep_lines=torch.is_grad_enabled()
        )
        self._stack.inside = self._enter_or_leave
        self.outcome = Outcome(self._trace.births, batch=batch, operations=0)
        self._mark(named, batch)
        try:
            with self._stack.hooks(), self._trace:
                self._forward_and_backward(args, kwargs, named)
        except Exception as error:  # whatever the model raises, what was seen until then counts
            self.outcome.error = error
        self.outcome.operations = self._trace.operations
        self._look_at_state()

    def _enter_or_leave(self, inside: bool) -> None:
        if self._task.whole and self._trace.phase != "backward":
            self._trace.phase = "forward" if inside else "loss"

    def _mark(self, named: list[tuple[str, Tensor]], batch: int | None) -> None:
        """Say what is not finite before the first operation."""
        for i, (name, tensor) in enumerate(named):
            found = flags(tensor)
            if any(found):
                # -Inf in anything but the signal itself is how masks are handed over
                mask = (i > 0 or "mask" in name) and not found.nan and not found.positive
                birth = Birth("mask" if mask else "input", -1, Place(), found, name=name)
                birth.samples = samples(tensor, batch)
                self._trace.mark(tensor, birth)
        model = self._task.model
        kinds: list[tuple[Kind, Iterable[tuple[str, Tensor]]]] = [
            ("parameter", model.named_parameters()),
            ("buffer", model.named_buffers()),
        ]
        for kind, owned in kinds:
            for name, tensor in owned:
                found = flags(tensor)
                if any(found):
                    constant = kind == "buffer" and not found.nan and not _statistic(name)
                    name = plain(name)  # noqa: PLW2901 - without wrappers from here on
                    self._bad_before.add(name)
                    birth = Birth("mask" if constant else kind, -1, Place(name.rpartition(".")[0]), found, name=name)
                    self._trace.mark(tensor, birth)

    def _forward_and_backward(self, args: Any, kwargs: Any, named: list[tuple[str, Tensor]]) -> None:
        task, trace, outcome = self._task, self._trace, self.outcome
        output = task.call(*args, **kwargs)
        returned = dict(tensors(output, depth=8))
        with trace.looking_away():
            reached = [i for each in returned.values() if trace.sources(each) for i in samples(each, outcome.batch)]
        outcome.samples = tuple(sorted(set(reached)))
        if task.loss is None:
            self._judge("forward", returned)
            return
        trace.phase = "loss"
        loss = scalar(task.loss if isinstance(task.loss, Tensor) else task.loss(output))
        self._judge("loss", {"loss": loss})
        if outcome.phase is None and loss.requires_grad:
            trace.phase = "backward"
            # the graph of a tensor that was given is not ours to free
            loss.backward(retain_graph=isinstance(task.loss, Tensor))  # type: ignore[no-untyped-call]
            owners = [(plain(name), each) for name, each in task.model.named_parameters()] + named
            got = {name: each.grad for name, each in owners if each.is_leaf and each.grad is not None}
            outcome.gradients = self._judge("backward", got)

    def _judge(self, phase: Phase, results: Mapping[str, Tensor]) -> list[str]:
        """Say which of the results are not finite: deliberate -Inf in an output is healthy, in a loss it is not."""
        bad: list[str] = []
        with self._trace.looking_away():
            for name, each in results.items():
                found = flags(each)
                if not any(found):
                    continue
                bad.append(name)
                births = self._trace.sources(each)
                if not births:
                    self._trace.mark(each, Birth("operation", self._trace.operations, Place(), found, phase))
                    births = frozenset([len(self._trace.births) - 1])
                real = frozenset(i for i in births if self._trace.births[i].kind != "mask")
                if real or phase != "forward":
                    self.outcome.phase = phase
                    self.outcome.culprits |= real or births
        return bad

    def _look_at_state(self) -> None:
        """Find what the run has written: NaN, Inf in a statistic, and any other Inf that nobody wrote on purpose."""
        model = self._task.model
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            found = flags(tensor)
            if not any(found) or plain(name) in self._bad_before:
                continue
            births = self._trace.sources(tensor)
            if found.nan or _statistic(name) or any(self._trace.births[i].kind != "mask" for i in births):
                self.outcome.state[plain(name)] = births

    def _owner(self, tensor: Tensor) -> str:
        """Name a tensor that is a plain attribute of a module."""
        place = storage(tensor)
        for name, module in self._task.model.named_modules():
            for key, value in _plain_attributes(module):
                own = storage(value)
                if place is not None and own is not None and own._cdata == place._cdata:  # noqa: SLF001 - the address names a storage
                    return f"{plain(name)}.{key}".lstrip(".")
        return ""


class _Stack:
    """Which modules are running."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {id(module): plain(name) for name, module in model.named_modules()}
        self._running: list[tuple[int, str, int]] = []
        self._calls: dict[str, int] = {}
        self.inside: Callable[[bool], None] = lambda _: None

    def top(self) -> tuple[str, int]:
        """Return name and call index of the innermost one, `("", 0)` without any."""
        return self._running[-1][1:] if self._running else ("", 0)

    def _enter(self, module: nn.Module, *_: object) -> None:
        name = self._names[id(module)]
        self._running.append((id(module), name, self._calls.get(name, 0)))
        self._calls[name] = self._calls.get(name, 0) + 1
        if module is self._model:
            self.inside(True)

    def _leave(self, module: nn.Module, *_: object) -> None:
        while self._running and self._running.pop()[0] != id(module):
            pass
        if module is self._model:
            self.inside(False)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow calls; hooks of the user run inside of ours, since weight_norm and its like compute in a hook."""
        with ExitStack() as undo:
            for module in self._model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                undo.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                undo.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield


def scalar(value: Any) -> Tensor:
    """Return the loss in what a loss function returns: a tensor, a dictionary with `loss`, a tuple that begins with it.

    Raises:
        ValueError: none of these, or not one number.
    """
    found = value
    if isinstance(value, dict):
        found = value.get("loss", next((each for each in value.values() if isinstance(each, Tensor)), None))
    elif isinstance(value, tuple | list):
        found = next((each for each in value if isinstance(each, Tensor)), None)
    elif not isinstance(value, Tensor):
        found = getattr(value, "loss", None)
    if not isinstance(found, Tensor) or found.numel() != 1:
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"loss must give one number, got {shape}. Reduce it, e.g. with .mean(), or return the tensor.")
    return found.reshape(())


def _copies(value: Any, repair: Repair) -> Any:
    """Copy the tensors of a batch: models write into their inputs."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        if repair.inputs and (copied.is_floating_point() or copied.is_complex()):
            copied = torch.nan_to_num(copied, nan=1.0, posinf=1.0, neginf=-1.0)
        return copied.requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return value._replace(data=_copies(value.data, repair))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copies(each, repair) for each in value))
    if type(value) in (tuple, list):
        return type(value)(_copies(each, repair) for each in value)
    return {key: _copies(each, repair) for key, each in value.items()} if type(value) is dict else value


def _named(value: Any) -> list[tuple[str, Tensor]]:
    return list(tensors(value, "args" if isinstance(value, tuple) else "", depth=8))


def _batch_size(named: list[tuple[str, Tensor]]) -> int | None:
    for _, tensor in named:
        if tensor.dim():
            return tensor.size(0)
    return None


def _statistic(name: str) -> bool:
    """Whether a buffer follows the data: an Inf in it is a fault, whereas in a mask it is not."""
    return "running" in name.rpartition(".")[2]


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as they were written, and keep autocast's copies of weights out of other runs."""
    compiled = any(
        type(each).__name__ == "OptimizedModule" or each._compiled_call_impl is not None  # noqa: SLF001 - no other way to ask
        for each in model.modules()
    )
    torch.clear_autocast_cache()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        torch.clear_autocast_cache()


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a module keeps without registering them: a moving average, a recurrent state in a tuple."""
    for key, value in vars(module).items():
        if key not in ("_parameters", "_buffers", "_modules"):
            for path, each in tensors(value, depth=3):
                yield key + (f"[{path.replace('.', '][')}]" if path else ""), each


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """Put plain attributes of modules back: counters, averages kept as tensors."""
    held = [(module, dict(vars(module))) for module in model.modules()]
    kept = [(each, each.detach().clone()) for module, _ in held for _, each in _plain_attributes(module)]
    try:
        yield
    finally:
        for module, own in held:
            vars(module).clear()
            vars(module).update(own)
        for tensor, value in kept:
            tensor.data.copy_(value)
