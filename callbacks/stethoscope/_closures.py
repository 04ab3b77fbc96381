"""Optimizers that compute the loss themselves, by a closure: each evaluation is looked at, and a bad step is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope._dropped import unhook_optimizers
from stethoscope._record import FindingsError
from stethoscope.audits._nonfinite_run import scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Closures:
    """Wraps the closures of one guard's optimizers.

    An optimizer that evaluates once (Adam in Lightning) writes after it. One that evaluates again has moved its weights by then,
    so weights and state are copied before the first evaluation: of LBFGS always, of others from the second step on.

    Args:
        optimizers: whose steps to undo.
        look: takes an optimizer and its loss, and says whether the evaluation is bad.
        failed: takes an error of ours, which must not reach the optimizer's step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        look: Callable[[Optimizer, Tensor | None], bool],
        failed: Callable[[Exception], None],
    ) -> None:
        self._look, self._failed = look, failed
        self._again = {id(each) for each in optimizers if isinstance(each, torch.optim.LBFGS)}
        self._before: dict[int, tuple[list[tuple[Tensor, Tensor]], dict[Any, Any]]] = {}
        self._bad: set[int] = set()
        self._depth: dict[int, int] = {}  # a step may call its base class's, which calls the hooks once more
        self._handles: list[RemovableHandle] = [each.register_step_post_hook(self._after) for each in optimizers]

    def enter(self, optimizer: Optimizer) -> None:
        """Take note of a step inside of a step."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1

    def wrap(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure to give to the optimizer."""
        evaluations = 0
        me = id(optimizer)
        self._bad.discard(me)
        self._depth[me] = 1

        def guarded() -> Any:
            nonlocal evaluations
            evaluations += 1
            try:
                self._before_evaluation(optimizer, evaluations)
            except Exception as error:  # too little memory for the copies, say
                self._failed(error)
            loss = closure()
            try:
                return self._after_evaluation(optimizer, evaluations, loss)
            except FindingsError:  # what `guard="raise"` is for
                raise
            except Exception as error:
                self._failed(error)
                return loss

        return guarded

    def _before_evaluation(self, optimizer: Optimizer, evaluation: int) -> None:
        if evaluation > 1:
            self._again.add(id(optimizer))
        elif id(optimizer) in self._again:
            self._before[id(optimizer)] = _copied(optimizer)

    def _after_evaluation(self, optimizer: Optimizer, evaluation: int, loss: Any) -> Any:
        """Look at it, and return the loss to tell the optimizer."""
        me = id(optimizer)
        if me in self._bad:  # nothing that follows is to be written either
            for each in _owned(optimizer):
                each.grad = None
        elif self._look(optimizer, _scalar(loss)):
            self._bad.add(me)
        high = me in self._bad and evaluation > 1 and isinstance(optimizer, torch.optim.LBFGS)
        # its line search fails on NaN, and comes back from a loss that is high
        return torch.finfo(torch.float32).max if high else loss

    def undo(self, optimizer: Optimizer) -> None:
        """Put weights and state back to where they were before the first evaluation, where they are known."""
        weights, state = self._before.pop(id(optimizer), ([], None))
        for weight, value in weights:
            weight.data.copy_(value)
        if state is not None:
            optimizer.state.clear()
            optimizer.state.update(state)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._leave(optimizer)
        except Exception as error:
            self._failed(error)

    def _leave(self, optimizer: Optimizer) -> None:
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 1) - 1
        if self._depth[id(optimizer)] > 0:
            return
        if id(optimizer) in self._bad:
            self.undo(optimizer)
        self._before.pop(id(optimizer), None)
        self._bad.discard(id(optimizer))

    def detach(self) -> None:
        """Remove the hooks."""
        unhook_optimizers(self._handles)
        self._before.clear()


def _owned(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _copied(optimizer: Optimizer) -> tuple[list[tuple[Tensor, Tensor]], dict[Any, Any]]:
    weights = [(each, each.detach().clone()) for each in _owned(optimizer)]
    # LBFGS writes into tensors of its state and appends to lists in it, but leaves what is in the lists alone
    state = {
        parameter: {
            key: value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
            for key, value in held.items()
        }
        for parameter, held in optimizer.state.items()
    }
    return weights, state


def _scalar(loss: Any) -> Tensor | None:
    try:
        return scalar(loss)
    except ValueError:  # a closure that returns no tensor: the gradients will tell
        return None
