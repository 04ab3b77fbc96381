"""How rarely to observe, so that observing takes no more than a share of the training's time."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LONE = 16
"""Where a probe is due at every step, one step in so many goes unobserved, to be compared with."""

WARM_UP = 3
"""Steps at the start that are slow for reasons of their own."""

_PLAIN = 31  # unobserved steps whose median an observed one is compared with
_KEPT = 400  # comparisons remembered per load; noise of 5 % in a step's time leaves 0.3 % in their median
_ENOUGH = 5  # comparisons before the first judgement; then whenever they have doubled, then after each _ROUND
_ROUND = 100
_SLACK = 0.7  # the interval is shortened only when it may be shortened by this much: it must not flutter with the noise
_HORIZON = 10_000  # steps over which loads are counted


class _Lap(NamedTuple):
    load: frozenset[int]
    begin: Any
    end: Any


class Pace:
    """Measures what observing costs and stretches all intervals of the probes alike.

    The time from the end of one `step` to the end of the next is taken on the device's clock: CUDA events on a GPU, the
    process's own time on the CPU, so that waiting for data and other programs do not count. Each observed step is compared with
    the median of the last 31 unobserved ones. From the median excess of each load (which probes are at work) and
    from how often it is due follows the share; intervals are multiplied by the smallest whole number that brings it under the
    target, and are never shorter than what was asked for. What runs in other phases does not count.

    Args:
        target: share of the training's time, e.g. `0.01`.
        intervals: of the probes, in steps.
        device: whose clock counts.

    Attributes:
        stretch: what all intervals are multiplied by.
    """

    def __init__(self, target: float, intervals: Sequence[int], device: torch.device) -> None:
        self.stretch = 1
        self._target, self._intervals = target, intervals
        self._clock = _Cuda() if device.type == "cuda" else _Host(device)
        self._rates = _rates(intervals)
        self._laps: deque[_Lap] = deque()
        self._begin: Any = None
        self._plain: deque[float] = deque(maxlen=_PLAIN)
        self._excess: dict[frozenset[int], deque[float]] = {}
        self._comparisons = self._judged = 0
        self._warm_up = WARM_UP
        self._load = self.load(0)

    def lone(self, step: int) -> bool:
        """Whether this step goes unobserved because no other would."""
        return min(self._intervals, default=2) * self.stretch == 1 and step % LONE == LONE - 1

    def load(self, step: int) -> frozenset[int]:
        """Return the probes that are due at a step, by number."""
        return frozenset(i for i, every in enumerate(self._intervals) if self.due(step, every))

    def due(self, step: int, every: int) -> bool:
        """Whether a probe of this interval looks at a step."""
        return not self.lone(step) and step % (every * self.stretch) == 0

    def interrupt(self) -> None:
        """Something other than training takes place in the step under way: its time is not counted."""
        self._begin = None

    def lap(self, step: int) -> None:
        """Close a step, and adapt."""
        now = self._clock.mark()
        if self._warm_up:
            self._warm_up -= 1
        elif self._begin is not None:
            self._laps.append(_Lap(self._load, self._begin, now))
        self._begin, self._load = now, self.load(step + 1)  # the next step's probes are armed by now
        while self._laps and (seconds := self._clock.between(*self._laps[0][1:])) is not None:
            self._compare(self._laps.popleft().load, seconds)
        if self._comparisons >= self._judged + min(max(self._judged, _ENOUGH), _ROUND):
            self._judged = self._comparisons
            self._adapt()

    @property
    def share(self) -> float | None:
        """The share that observing takes at the present intervals; None as long as nothing is known."""
        full = self._full_share()
        return None if full is None else full / self.stretch

    def _compare(self, load: frozenset[int], seconds: float) -> None:
        if not load:
            self._plain.append(seconds)
        elif len(self._plain) >= _ENOUGH and (plain := median(self._plain)) > 0:
            self._excess.setdefault(load, deque(maxlen=_KEPT)).append(seconds / plain - 1)
            self._comparisons += 1

    def _full_share(self) -> float | None:
        if self._comparisons < _ENOUGH:
            return None
        known = {load: max(median(seen), 0.0) for load, seen in self._excess.items()}
        dearest = max(known.values())  # stands for a load that was not seen yet
        return sum(rate * known.get(load, dearest) for load, rate in self._rates.items() if load)

    def _adapt(self) -> None:
        full = self._full_share()
        if full is None:
            return
        wanted = max(1, math.ceil(full / self._target))
        if wanted > self.stretch or wanted <= _SLACK * self.stretch:
            self.stretch = wanted


def parse(overhead: str | float | None) -> float | None:
    """Return the share.

    Raises:
        ValueError: no share of the time.

    Examples:
        >>> parse("1%"), parse(0.02)
        (0.01, 0.02)
    """
    if overhead is None:
        return None
    try:
        share = float(overhead.removesuffix("%")) / 100 if isinstance(overhead, str) else float(overhead)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1 or (isinstance(overhead, str) and not overhead.endswith("%")):
        raise ValueError(f"overhead must be a share of the training's time such as '1%' or 0.01, got {overhead!r}.")
    return share


def _rates(intervals: Sequence[int]) -> Mapping[frozenset[int], float]:
    """How often each combination of probes is due together, per step."""
    steps = min(math.lcm(*intervals), _HORIZON) if intervals else 1
    loads = Counter(frozenset(i for i, every in enumerate(intervals) if step % every == 0) for step in range(steps))
    return {load: count / steps for load, count in loads.items()}


class _Host:
    def __init__(self, device: torch.device) -> None:
        # an accelerator without events of ours is seen only through the wall clock
        self.mark = time.process_time if device.type == "cpu" else time.perf_counter

    def between(self, begin: float, end: float) -> float:
        return end - begin


class _Cuda:
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1000 if end.query() else None  # type: ignore[no-untyped-call]
