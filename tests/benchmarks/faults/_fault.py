"""`Fault`: a training program with one thing wrong, and the truth about it; `Healthy`: one with nothing wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from faults._training import Training

Edit: TypeAlias = "Callable[[Training], None]"

# What follows from a fault without being it: right to report, but no detection.
DIVERGES = (
    "loss-diverged", "loss-spike", "gradient-exploding", "activation-exploding", "update-ratio-high", "weight-norm-drift",
    "nonfinite-buffer",
)  # fmt: skip
NONFINITE = (
    "nonfinite-activation", "nonfinite-loss", "nonfinite-gradient", "nonfinite-parameter", "nonfinite-optimizer",
    "output-nonfinite", "loss-diverged", "metric-nonfinite",
)  # fmt: skip
FLAT = ("feature-constant", "activation-vanishing", "gradient-vanishing", "norm-input-variance")
STUCK = (
    "loss-plateau", "stalled-optimisation", "stalled-from-start", "prediction-collapse", "output-constant", "metric-constant",
)  # fmt: skip


HELD_OUT = ("blind_6", "blind_7")
"""Folders of the cases that are run only once."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong.

    Args:
        name: what is wrong, in two or three words.
        program: the module whose `build` makes the healthy program.
        apply: the patch.
        codes: findings that name the fault; the first is the best.
        modules: names that are right for the guilty module: exactly these or inside of them; `""` for none. Empty where no
            module is to blame.
        step: from which the fault can be seen.
        then: codes that follow from it: right, but no detection.
        why: the patch's docstring: what is wrong, and whose catalogue has it.
    """

    name: str
    program: ModuleType
    apply: Edit
    codes: tuple[str, ...]
    modules: tuple[str, ...]
    step: int
    then: tuple[str, ...]
    why: str

    @property
    def held_out(self) -> bool:
        """Whether it is run only once, when the watches are finished."""
        return self.folder in HELD_OUT

    @property
    def folder(self) -> str:
        """The set that it belongs to."""
        return folder(self.apply)

    def build(self) -> Training:
        training = self.program.build()
        self.apply(training)
        return training


def fault(
    program: ModuleType,
    *codes: str,
    modules: tuple[str, ...] = (),
    step: int = 0,
    then: tuple[str, ...] = (),
) -> Callable[[Edit], Fault]:
    """Make a `Fault` of a patch."""

    def made(apply: Edit) -> Fault:
        return Fault(apply.__name__, program, apply, codes, modules, step, then, apply.__doc__ or "")

    return made


@dataclass(frozen=True)
class Healthy:
    """Nothing wrong, however it looks: whatever is reported is a false alarm."""

    name: str
    build: Callable[[], Training]
    why: str

    @property
    def held_out(self) -> bool:
        """Whether it is run only once, when the watches are finished."""
        return self.folder in HELD_OUT

    @property
    def folder(self) -> str:
        """The set that it belongs to."""
        return folder(self.build)


def healthy(build: Callable[[], Training]) -> Healthy:
    """Make a `Healthy` of a function that builds a training."""
    return Healthy(build.__name__, build, build.__doc__ or "")


def folder(made: Callable[..., object]) -> str:
    """Where a case lies."""
    return made.__module__.split(".")[1]
