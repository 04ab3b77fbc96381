"""Whether sparsification happens, as planned, and stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding
from stethoscope._schedule import Schedule, judge
from stethoscope.probes import Density

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

_PRUNED = 0.9
"""A matrix counts as sparse below this density: chance zeros (padding rows, clamped weights) stay above."""

_DENSE = 0.99
"""Above this density nothing was pruned."""

_NEAR = 0.2
"""A reading is as sparse as the sparsest so far if it has lost at most this share of its zeros."""


@dataclass(frozen=True)
class Sparsity:
    """Follows the density of every weight matrix and says when sparsification is missed or lost.

    **What it decides:** `schedule-unreachable` and `schedule-unfinished` at the first step, once the planned steps are
    known. `sparsity-missed` when the last action of the schedule should have removed half of what it is to remove in the
    end and the density has never been below 0.99, or when the schedule is complete and a matrix is 0.05 or more above its
    target. `sparsity-lost` when a matrix that was sparse (density below 0.9) has shown no such density for two intervals;
    without a schedule, for twice the longest pause so far and at least 200 steps. `watch-starved` when a pattern of `target`
    matches no matrix. Between the interval steps of a
    sparsifier an optimizer refills the zeros within one step: this saw-tooth is no loss.
    **Cost:** host, O(matrices). **Needs:** `Density` at every step; call `monitor.step()` after the sparsifier.

    Args:
        schedule: when the sparsifier acts, in optimizer steps made; None learns the rhythm from what is seen.
        target: density in the end, one for all matrices or by pattern of parameter names (`{"gru1.weight_ih*": 1 / 3}`;
            matrices that match none are not judged); None judges no amount.
        block: rows and columns of a block, recorded as `density/blocks`; None records elements only.
        metric: name of a logged metric, e.g. `"si_sdr_db"`: `sparsity-cost` (info) says what it was before the first zeros
            and what it is at the first log after the schedule is complete. Needs a schedule.

    Raises:
        ValueError: a target outside of [0, 1].

    Examples:
        >>> from stethoscope.audits import Schedule
        >>> from stethoscope.testing import replay, series
        >>> watch = Sparsity(Schedule("sparsify", 2500, 8000, 50))
        >>> replay(watch, series(steps=[0], **{"plan/steps": [1200.0]}))[0].code
        'schedule-unreachable'

    References: Zhu and Gupta 2017 (gradual pruning), arXiv:1710.01878.
    """

    schedule: Schedule | None = None
    target: float | Mapping[str, float] | None = None
    block: tuple[int, int] | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        targets = [self.target] if isinstance(self.target, (int, float)) else list((self.target or {}).values())
        if not all(0 <= target <= 1 for target in targets):
            raise ValueError(f"Target densities are {targets}. Legal: the share of weights that stay, 0 to 1.")

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Every step: between interval steps the zeros are gone."""
        return (Density(block=self.block, every=1),)

    def init(self) -> State:
        """Nothing seen."""
        return {
            "planned": False,
            "missed": False,
            "complete": False,
            "matrices": {},
            "before": None,
            "told": False,
            "unmatched": False,
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in the densities of one step."""
        state = {**state, "matrices": dict(state["matrices"])}
        found: list[Finding] = []
        step: int | None = None
        lost: dict[str, float] = {}
        for record in records:
            if record.source == "log" and record.name == self.metric and self.schedule is not None:
                found += self._cost(state, self.schedule, record)
            if record.phase != "train" or not isinstance(record.value, (int, float)):
                continue
            if record.name == "plan/steps" and self.schedule is not None and not state["planned"]:
                state["planned"] = True
                found += judge(self.schedule, record.value, record.step)
            elif record.name in {"density/weights", "density/initial", "density/elements"}:
                matrix = dict(state["matrices"].get(record.module) or _unseen())
                state["matrices"][record.module] = matrix
                if record.name == "density/weights":
                    matrix["weights"] = round(record.value)
                elif record.name == "density/initial":
                    self._initial(matrix, record)
                else:
                    step = record.step
                    if self._follow(matrix, record):
                        lost[record.module] = float(record.value)
        if lost and step is not None:
            found.append(_lost(lost, state["matrices"], step))
        if step is not None and not state["unmatched"]:
            found += self._unmatched(state, step)
        if step is not None and self.schedule is not None:
            found += self._against_schedule(state, self.schedule, step)
        return state, found

    def _initial(self, matrix: dict[str, Any], record: Record) -> None:
        """A model that comes sparse, as after resuming."""
        if isinstance(record.value, float) and 0 < record.value < _PRUNED:
            matrix |= {"dropped": True, "low": record.value, "low_step": record.step, "last": record.step}

    def _follow(self, matrix: dict[str, Any], record: Record) -> bool:
        """One reading of one matrix; whether its sparsity is lost as of now."""
        assert isinstance(record.value, (int, float))
        density, step = float(record.value), record.step
        matrix["high"] = max(matrix["high"], density)
        # zero initialisations are sparse from the start and fill up: only what became sparser was pruned
        matrix["dropped"] = matrix["dropped"] or (density < _PRUNED and density < matrix["high"] - 0.05)
        if not matrix["dropped"]:
            return False
        if density < matrix["low"]:
            matrix |= {"low": density, "low_step": step}
        if density <= matrix["low"] + _NEAR * (1 - matrix["low"]):
            if matrix["last"] is not None and not matrix["lost"]:
                matrix["pause"] = max(matrix["pause"], step - matrix["last"])
            matrix |= {"last": step, "lost": False}
            return False
        patience = 2 * self.schedule.interval if self.schedule is not None else max(2 * matrix["pause"], 200)
        if matrix["lost"] or step - matrix["last"] <= patience:
            return False
        matrix["lost"] = True
        return True

    def _cost(self, state: dict[str, Any], schedule: Schedule, record: Record) -> list[Finding]:
        """The metric before and after: the last value while all was dense, the first one once all is done."""
        value, count = record.value, record.step + 1
        if not isinstance(value, (int, float)) or not isfinite(value):
            return []
        if schedule.density(count, 0.0) == 1.0:
            state["before"] = [record.step, value]
        if count < schedule.stop or state["told"] or state["before"] is None:
            return []
        state["told"] = True
        step, before = state["before"]
        weights = sum(matrix["weights"] for matrix in state["matrices"].values())
        kept = sum(matrix["weights"] * matrix["low"] for matrix in state["matrices"].values())
        return [
            Finding(
                "sparsity-cost",
                "info",
                f"{record.name} was {before:.4g} at step {step}, before '{schedule.name}' began, and is {value:.4g} at step {record.step}, "
                f"after it was complete, with {kept / max(weights, 1):.0%} of {weights} weights: a change of {value - before:+.4g}.",
                "Compare with a dense run of the same length: training on may have brought as much as pruning has cost.",
                step=record.step,
                phase=record.phase,
                evidence={
                    "metric": record.name,
                    "before": before,
                    "after": value,
                    "weights": weights,
                    "kept": round(kept),
                },
            )
        ]

    def _unmatched(self, state: State, step: int) -> list[Finding]:
        """A target for a matrix that does not exist is judged by nobody."""
        state["unmatched"] = True
        names = list(state["matrices"])
        patterns = list(self.target) if isinstance(self.target, Mapping) else []
        idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if not idle:
            return []
        return [
            Finding(
                "watch-starved",
                "warning",
                f"Sparsity has a target for {', '.join(map(repr, idle))}, which matches none of the {len(names)} weight matrices.",
                f"Targets go by parameter name: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}.",
                step=step,
                evidence={"patterns": idle},
            )
        ]

    def _against_schedule(self, state: State, schedule: Schedule, step: int) -> list[Finding]:
        count = step + 1
        found: list[Finding] = []
        matrices: dict[str, dict[str, Any]] = state["matrices"]
        removed = 1 - schedule.density(count, 0.0)
        if not state["missed"] and removed >= 0.5 and all(matrix["low"] > _DENSE for matrix in matrices.values()):
            state["missed"] = True
            found.append(
                Finding(
                    "sparsity-missed",
                    "error",
                    f"'{schedule.name}' should have removed {removed:.0%} of what it is to remove by now, but all {len(matrices)} weight matrices are dense.",
                    "Check that the sparsifier is called after optimizer.step() and before monitor.step(), and that it holds the modules that are trained.",
                    step=step,
                    evidence={"removed_share": removed, "matrices": len(matrices)},
                )
            )
        if self.target is not None and not state["complete"] and not state["missed"] and count >= schedule.stop:
            state["complete"] = True
            targets = {name: self._target_of(name) for name in matrices}
            above = {
                name: target
                for name, target in targets.items()
                if target is not None and matrices[name]["low"] > target + 0.05
            }
            found += [_above_target(above, matrices, step)] if above else []
        return found

    def _target_of(self, name: str) -> float | None:
        if self.target is None or isinstance(self.target, (int, float)):
            return self.target
        return next((value for pattern, value in self.target.items() if fnmatchcase(name, pattern)), None)


def _lost(lost: Mapping[str, float], matrices: Mapping[str, dict[str, Any]], step: int) -> Finding:
    first, density = next(iter(lost.items()))
    matrix = matrices[first]
    return Finding(
        "sparsity-lost",
        "warning",
        f"The density of '{first}'{_others(lost)} is {density:.3f} and has been above {matrix['low']:.3f}, which it had at step {matrix['last']}, "
        f"for {step - matrix['last']} steps: {_times(matrix, density, matrix['low'])}.",
        "Keep calling the sparsifier after each optimizer step. One that was built anew for a resumed run counts from 0 again: restore its counter or set start to 0.",
        step=step,
        module=first,
        evidence={
            "matrices": list(lost),
            "density": density,
            "lowest": matrix["low"],
            "last_sparse_step": matrix["last"],
        },
    )


def _above_target(above: Mapping[str, float], matrices: Mapping[str, dict[str, Any]], step: int) -> Finding:
    first, target = next(iter(above.items()))
    matrix = matrices[first]
    return Finding(
        "sparsity-missed",
        "error",
        f"The schedule is complete, but '{first}'{_others(above)} has density {matrix['low']:.3f} instead of {target:.3f}: {_times(matrix, matrix['low'], target)}.",
        "Check the densities that were given to the sparsifier and that it holds this matrix.",
        step=step,
        module=first,
        evidence={"matrices": list(above), "density": matrix["low"], "target": target, "weights": matrix["weights"]},
    )


def _others(names: Mapping[str, float]) -> str:
    return f" (and {len(names) - 1} more alike)" if len(names) > 1 else ""


def _times(matrix: Mapping[str, Any], density: float, target: float) -> str:
    weights = matrix["weights"]
    counts = (
        f"{round(density * weights)} weights to export instead of {round(target * weights)}"
        if weights
        else f"density {density:.3f} instead of {target:.3f}"
    )
    return f"{counts}, {density / target:.1f} times as many" if target > 0 else counts


def _unseen() -> dict[str, Any]:
    return {
        "weights": 0,
        "high": 0.0,
        "low": 1.0,
        "low_step": None,
        "dropped": False,
        "last": None,
        "pause": 0,
        "lost": False,
    }
