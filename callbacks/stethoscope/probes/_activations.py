"""What to measure of what modules take and return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope.probes._bank import MOMENTS, RANGE, SAMPLED
from stethoscope.probes._flags import FlagHooks
from stethoscope.probes._select import Pattern, includes, settle
from stethoscope.probes._statistics import ActivationHooks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from stethoscope._protocols import Attachment, Probe

DEFAULT = ("mean", "rms", "min", "max", "zero_fraction", "nonfinite", "histogram")
KNOWN = frozenset(RANGE | SAMPLED | MOMENTS | {"mean", "rms", "nonfinite_count"})


@dataclass(frozen=True)
class Activations:
    """Statistics of every module's inputs and outputs, as `activation/<statistic>` and `activation/input_<statistic>`.

    **Records**, per module, call and tensor, over all micro-batches of a step:
    `mean`, `rms` = sqrt(mean(x^2)), `min`, `max`, `absmax`, `std` (population), `kurtosis` = m4 / m2^2, exact over all
    values; `zero_fraction` in [0, 1] and `histogram` (`stats.HISTOGRAM_EDGES`) from a regular sample; `nonfinite` is 1
    where there is an Inf, 2 where there is a NaN, and left out where there is neither; `nonfinite_count` counts both.
    `outermost_nonfinite` says the same of what the model as a whole returned, healthy or not; -Inf counts as finite in
    it, since masked scores and log(0) are healthy, and in second and further inputs, where masks are handed over.
    The first tensor of an output carries the plain name, others their path, e.g. `activation/rms.1.0` for the hidden
    state of an LSTM. Complex tensors are measured by magnitude. Integer tensors count where they are all there is.

    **Cost:** a forward pre-hook and a forward hook per module; up to four tensor operations for a tensor that was not
    seen before. Memory on the device: `sample` values and 14 numbers per tensor. Never waits for the device.

    Args:
        statistics: any of the above without prefix.
        include: name patterns (`"encoder.*"`), module types or predicates of name and module; empty for all.
        exclude: the same, to leave out.
        inputs: whether to read inputs as well.
        phases: phases to observe, None for all.
        every: observe when `step % every == 0`; None takes the monitor's.
        sample: values per tensor and pass for `zero_fraction` and `histogram`.

    Raises:
        ValueError: an unknown statistic.

    Examples:
        >>> Activations(statistics=("rms",), include="encoder.*", every=10).statistics
        ('rms',)
    """

    statistics: tuple[str, ...] = DEFAULT
    include: Pattern | Iterable[Pattern] = ()
    exclude: Pattern | Iterable[Pattern] = ()
    inputs: bool = True
    phases: tuple[str, ...] | None = None
    every: int | None = None
    sample: int = 2048

    def __post_init__(self) -> None:
        settle(self, sorted(KNOWN), "activation")
        if self.sample < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"sample and every must be at least 1, got sample={self.sample}, every={self.every}.")

    def attach(self, model: nn.Module) -> Attachment:
        """Hook the chosen modules of `model`."""
        return FlagHooks(self, model) if set(self.statistics) == {"nonfinite"} else ActivationHooks(self, model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` asks for nothing that this one does not record at least as often."""
        return (
            isinstance(other, Activations)
            and includes(self, other)
            and (self.inputs or not other.inputs)
            and (self.phases is None or (other.phases is not None and set(other.phases) <= set(self.phases)))
        )
