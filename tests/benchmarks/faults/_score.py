"""Running one case under one observer, and the judgement of what was reported."""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from faults._fault import Fault, Healthy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from faults._seen import Seen


@dataclass
class Result:
    """One case under one observer.

    Args:
        found: the first report that names the fault, not before its step.
        right, wrong: reports of warning or above: acceptable or a declared consequence, or not.
        asides: infos.
        module_right: whether `found` names the guilty module first; None where no module is to blame or nothing was found.
        delay: steps from where the fault can be seen to `found`.
        crash: the observer's own exception.
    """

    case: str
    program: str
    faulty: bool
    held_out: bool
    best: str = ""
    found: Seen | None = None
    first_right: bool = False
    right: list[Seen] = field(default_factory=list)
    wrong: list[Seen] = field(default_factory=list)
    asides: list[Seen] = field(default_factory=list)
    module_right: bool | None = None
    delay: int | None = None
    crash: str = ""
    seconds: float = 0.0


def run(case: Fault | Healthy, observer: object) -> Result:
    """Train with the observer attached, and judge what it says."""
    torch.set_num_threads(1)
    start, reports, crash = time.process_time(), [], ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.build().run(observer)
            reports = observer.finish()
        except Exception:
            crash = traceback.format_exc(limit=-2)
    return judge(case, reports, crash, time.process_time() - start)


def judge(case: Fault | Healthy, reports: Iterable[Seen], crash: str = "", seconds: float = 0.0) -> Result:
    """Apply the rules of the page."""
    faulty = isinstance(case, Fault)
    program = case.program.__name__.rpartition(".")[2] if faulty else "healthy"
    result = Result(case.name, program, faulty, case.held_out, crash=crash, seconds=seconds)
    loud = [seen for seen in reports if not seen.info]
    result.asides = [seen for seen in reports if seen.info]
    if not faulty:
        result.wrong = loud
        return result
    result.best = case.codes[0]
    for seen in loud:
        (result.right if is_right(case, seen) else result.wrong).append(seen)
    named = [seen for seen in loud if set(seen.codes) & set(case.codes) and seen.step >= case.step]
    if named:
        result.found = min(named, key=lambda seen: seen.step)
        result.delay = result.found.step - case.step
        result.first_right = min(loud, key=lambda seen: seen.step) in named
        if case.modules:
            result.module_right = is_inside(result.found.modules[0], case.modules)
    return result


def is_right(case: Fault, seen: Seen) -> bool:
    """Acceptable, explained by something acceptable, or a declared consequence; and not before the fault."""
    codes = set(seen.codes) | ({seen.cause} if seen.cause else set())
    return bool(codes & {*case.codes, *case.then}) and seen.step >= case.step


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module's or parameter's name is one of these, or inside of one."""
    return any(name == module or (module and name.startswith(f"{module}.")) for module in modules)


@dataclass(frozen=True)
class Summary:
    """Figures over some results."""

    faults: int
    found: int
    right: int
    wrong: int
    modules: int
    modules_right: int
    first_right: int
    delay: float | None
    healthy: int
    alarms: int
    alarmed: int
    crashes: int

    @property
    def recall(self) -> float:
        return self.found / max(1, self.faults)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)


def summarise(results: Iterable[Result], keep: Callable[[Result], bool] = lambda result: True) -> Summary:
    """Add up."""
    kept = [result for result in results if keep(result)]
    faults, healthy = [r for r in kept if r.faulty], [r for r in kept if not r.faulty]
    delays = [r.delay for r in faults if r.delay is not None]
    named = [r for r in faults if r.module_right is not None]
    return Summary(
        faults=len(faults),
        found=len(delays),
        right=sum(len(r.right) for r in faults),
        wrong=sum(len(r.wrong) for r in faults),
        modules=len(named),
        modules_right=sum(bool(r.module_right) for r in named),
        first_right=sum(r.first_right for r in faults),
        delay=statistics.median(delays) if delays else None,
        healthy=len(healthy),
        alarms=sum(len(r.wrong) for r in healthy),
        alarmed=sum(bool(r.wrong) for r in healthy),
        crashes=sum(bool(r.crash) for r in kept),
    )
