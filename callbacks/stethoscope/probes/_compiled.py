"""What was compiled runs as it was written while somebody looks at it, since compiled code calls no hooks.

torch's stance does that without a graph break, without compiling anything again and without a change to the graph. It is
process-wide, and so are the two variables in here.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from stethoscope._dropped import later, under_way
from stethoscope._record import Finding

if TYPE_CHECKING:
    from torch import nn

PATIENCE = 100
"""Steps that other monitors may end, a GAN's discriminator for one, before the wish of one that ends none does not count."""

_lookers: dict[int, int] = {}
"""Ids, so that a monitor that is dropped without `close` does not live on in here, and the turn in which each has asked."""
_turn = [0]
_untold: list[int] = []
"""Forgotten wishes: nobody is told before it is known that anything is compiled, which it is not while all runs eagerly."""
_ours: list[Any] = []
"""The stance that we have set, if any."""


class Eagerly:
    """One attachment's wish that compiled code runs eagerly."""

    def __init__(self, probe: str) -> None:
        self._probe = probe
        self._used, self._said = False, False

    def set(self, on: bool, phases: tuple[str, ...] | None, phase: str) -> None:
        """Ask for it, or no longer; nothing happens where nothing has loaded the compiler.

        Args:
            on: whether the attachment is armed.
            phases: of its specification. A phase other than training stays compiled unless it is named there: a whole
                validation without torch.compile is more than anybody asks for by `None`.
            phase: that begins.
        """
        if not on or (phases is None and phase != "train"):
            self.release()
        elif "torch._dynamo" in sys.modules:
            self._used = True
            _lookers[id(self)] = _turn[0]
            if not _ours:
                _ours.append(torch.compiler.set_stance("force_eager"))

    def release(self) -> None:
        """Ask for it no longer."""
        _release(id(self))

    def notes(self) -> list[Finding]:
        """What is to be said, once, of a training in which something is compiled and steps were observed eagerly."""
        if self._said or not self._used or not anything_compiled():
            return []
        self._said = True
        return [
            Finding(
                "observed-eagerly",
                "info",
                f"Compiled code cannot be looked into, so steps that {self._probe} observes run without torch.compile: they take "
                "eager time and memory, round as eager code does, and under inductor draw other random numbers for dropout.",
                "Nothing, if that is fine. Activations(phases=('val',)) leaves the training alone; a larger every= observes fewer "
                "steps; torch._inductor.config.fallback_random = True draws the same random numbers either way.",
                evidence={"probe": self._probe},
            )
        ]


def next_turn(step: int) -> list[Finding]:
    """This step of some monitor has ended. A wish that has outlived a hundred of them is forgotten, and that is said."""
    _turn[0] += 1
    for looker in [looker for looker, turn in _lookers.items() if _turn[0] - turn > PATIENCE]:
        _release(looker)
        _untold.append(looker)
    _give_back()
    if not _untold or not anything_compiled():
        return []
    _untold.clear()
    return [
        Finding(
            "monitor-left-open",
            "warning",
            f"A monitor that has ended no step while others ended {PATIENCE} had all steps run without torch.compile, since the one under "
            "way was to be observed. From here on they run compiled again.",
            "Close what is not used any more: monitor.close(), or `with Monitor(...) as monitor:` around the loop. In a notebook "
            "the traceback of an interrupted cell may hold it. Its next step() sets it to work again.",
            step,
            evidence={"steps": PATIENCE},
        )
    ]


def _release(looker: int) -> None:
    _lookers.pop(looker, None)
    _give_back()


def _give_back() -> None:
    """Put back the stance that was there before ours, when nobody wants ours any more."""
    if _lookers or not _ours:
        return
    # a compiled call must end as it began: with fullgraph=True torch raises otherwise
    if under_way(("torch._dynamo.eval_frame",), here=False):
        later(_give_back)
        return
    stance = _ours.pop()
    # a block of the user's that began under ours puts it back at its end: it is to mean then what held before ours
    vars(stance.stance).update(vars(stance.prev))
    # where somebody has set another one since, theirs stands
    if sys.modules["torch._dynamo.eval_frame"]._stance is stance.stance:  # noqa: SLF001  # there is no other way to ask
        stance.__exit__(None, None, None)


def anything_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["stats"])


def original(module: nn.Module) -> nn.Module:
    """The module that the user wrote, inside of a submodule's `torch.compile` wrapper."""
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else module  # type: ignore[return-value]  # noqa: SLF001
