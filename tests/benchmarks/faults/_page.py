"""The page `docs/scoreboard.md`: rules, figures, every miss and every false alarm."""

from __future__ import annotations

import datetime as dt
import platform
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from faults._fault import HELD_OUT
from faults._score import Result, Summary, summarise
from faults.cases import CASES, FAULTS, HEALTHY, PACKAGES, PROGRAMS
from faults.observer_ours import EVERY

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from faults._seen import Seen

DOCS = Path(__file__).parents[3] / "docs"


def programs() -> str:
    """One line each."""
    lines = []
    for program in PROGRAMS:
        about = " ".join((program.__doc__ or "").split())
        lines.append(f"- `{program.__name__.rpartition('.')[2]}`: {about[0].lower()}{about[1:]}")
    return "\n".join(lines)


RULES = f"""# Scoreboard

How often `presets.full()` finds what is wrong, and how often it cries wolf: {len(FAULTS)} seeded faults and {len(HEALTHY)} healthy runs of
{len(PROGRAMS)} small training programs and variants of them, each 150 to 400 steps on made-up data that can be learnt. This page is written
by one command, and by nothing else:

```sh
{{command}}
```

The programs, the faults with their truth, and the healthy runs are in `tests/benchmarks/faults`, a few lines each. The programs:

{programs()}

Classes of faults come from TheDeepChecker's catalogue, SageMaker Debugger's rules, TrainCheck's silent errors, GRIST's numerical
bugs, Humbatova's taxonomy, AutoTrainer's and UMLAUT's problems, and issues of public repositories: each docstring says which.

## Rules

- A fault's truth is written down before it is run: codes that name it, the guilty module, the first step at which it can be
  seen, and codes that follow from it.
- *Found*: a finding of warning or above with one of its codes, not before its step. Infos do not count.
- *Precision*: of the findings of warning or above in faulty runs, the share that is right: an acceptable code, a declared
  consequence, or `cause` set to one of these. One that comes before the fault is wrong, whatever it says.
- *First*: faults whose earliest finding of all already names the fault.
- *Module*: where a module is to blame and the fault was found, the finding that found it names that module or one inside.
- *Delay*: steps from where the fault can be seen to the finding that found it, median.
- *False alarms*: findings of warning or above in healthy runs. There, each one is wrong.
- *Held out*: the cases in {" and ".join(f"`{name}`" for name in HELD_OUT)}, {sum(f.held_out for f in FAULTS)} of the faults and {sum(h.held_out for h in HEALTHY)} of the healthy runs. Their authors had seen neither
  watches nor thresholds, only programs, symptoms and literature, and proved each fault by other means than this library. No watch is changed for
  what comes out of them; where that is done, they become *seen*, and a new set is written. *Seen*
  are all others, which anybody may run while watches are written. Of five cases the truth was widened after the run by a code that
  names the fault exactly and that their authors had not: `keep_rate_as_dropout` and `dropout_of_one` by dropout-high, `squeeze_forgotten` by
  loss-input-mismatch, `decayed_at_every_batch` by scheduler-ends-early, and `rate_cut_when_dice_rises` by scheduler-ends-early as a consequence.
- Every blind set was run once before anybody looked at it (2026-11-22). `presets.full()` found, of the code of that time:
  `blind_1` 54 of 80 faults with a precision of 99.4 % and alarms in 5 of 30 healthy runs; `blind_2` 31 of 40, 99.0 %, 0 of 20; `blind_3` 47 of 57,
  100 %, 0 of 10; `blind_4` 167 of 202, 98.4 %, 2 of 46; `blind_5` 157 of 189, 98.7 %, 0 of 0; `blind_6` 499 of 564, 96.8 %, 1 of 65; `blind_7` 246 of 278, 99.6 %, 0 of 22.
  The figures below are of one commit, so `blind_6` was run a second time for them. No rule was written for its cases, but the one for pictures in bytes (input-range)
  after its misses had stood here; and a warning of dead units has asked for nine tenths of a layer since a reviewer's healthy trainings, where it had been half.
- `blind_5` and `blind_6` are by the same six authors; `blind_7` is by four others, who had a copy of this folder and nothing else of the repository. Second readers, as blind, had
  checked each truth of the three before.
- *Cost*: process time of the first 60 steps with, over without, median over the programs, three pairs each. These models are far
  smaller than real ones, so the ratio is far larger: see [cost](cost.md) for real sizes.
- Observed every {EVERY} steps: a run of 300 steps is then looked at as often as one of 1500 at the default of 50.
- Peers run with their defaults, on the cases that their row names; ours has a row for the same ones. Each of their messages is taken for all of our codes that it may mean, repeated
  messages count once, and advice on style and speed is left out, for them and against them.

Not in here, since a single process of a few seconds cannot show it: faults of several ranks, stalls by the wall clock, leaks
of the target into the input ([causality](causality.md) has an audit for that).
"""


def page(
    results: Mapping[str, Sequence[Result]],
    costs: Mapping[str, float],
    missing: Sequence[str],
    command: str,
    commit: str = "",
) -> str:
    """The whole page; `commit` is where the results are from, if not from here."""
    ours = results["stethoscope"]
    halves = [("seen", lambda r: not r.held_out), ("held out", lambda r: r.held_out)]
    halves = [(name, keep) for name, keep in halves if any(keep(r) for r in ours)]
    parts = [
        RULES.replace("{command}", command),
        f"## Figures\n\n{stamp(commit)}\n",
        table(results, costs, halves, missing),
    ]
    parts.append("## Per program\n\n" + per_program(ours))
    parts.append(
        "## Per code\n\nOf `presets.full()`. *Faults* and *found*: those that the code names best.\n\n" + per_code(ours)
    )
    parts.append("## Every miss\n\n" + misses(ours))
    parts.append("## Every wrong finding in a faulty run\n\n" + wrongs([r for r in ours if r.faulty]))
    parts.append("## Every false alarm\n\n" + wrongs([r for r in ours if not r.faulty]))
    return "\n".join(parts)


def stamp(commit: str) -> str:
    peers = ", ".join(f"{package} {version(package)}" for name, (_, package) in PACKAGES.items() if _there(package))
    versions = f"torch {version('torch')}, Python {platform.python_version()}; stethoscope {version('stethoscope')}"
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = commit or subprocess.run(head, capture_output=True, text=True, check=False, cwd=DOCS).stdout.strip()
    versions += f" at commit {commit}" if commit else ""
    return f"Of {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}; {versions}{'; ' + peers if peers else ''}; one CPU thread a run."


def _there(package: str) -> bool:
    try:
        version(package)
    except Exception:
        return False
    return True


def table(
    results: Mapping[str, Sequence[Result]],
    costs: Mapping[str, float],
    halves: Sequence[tuple[str, Callable[[Result], bool]]],
    missing: Sequence[str],
) -> str:
    lines = [
        "| | cases | found | precision | first | module | delay | false alarms | healthy runs with one | crashes | cost |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    peers = {name: found for name, found in results.items() if name != "stethoscope"}
    common = {r.case for found in peers.values() for r in found}
    rows = [("stethoscope", half, keep) for half, keep in halves]
    if len(halves) > 1:
        rows.append(("stethoscope", "all", lambda _: True))
    if common:
        rows.append(("stethoscope", _folders(common), lambda r: r.case in common))
    rows += [(name, _folders(common), lambda _: True) for name in peers]
    for name, which, keep in rows:
        cost = f"{costs[name]:.2f}" if name in costs else "-"
        lines.append(f"| {name} | {which} | {row(summarise(results[name], keep))} | {cost} |")
    lines += [f"| {name} | | not installed | | | | | | | | |" for name in missing]
    return "\n".join(lines) + "\n"


def _folders(cases: Container[str]) -> str:
    """The sets that these cases make up."""
    return ", ".join(dict.fromkeys(case.folder for name, case in CASES.items() if name in cases))


def row(s: Summary) -> str:
    cells = [
        f"{s.found} of {s.faults} ({s.recall:.0%})",
        f"{s.right} of {s.right + s.wrong} ({s.precision:.0%})" if s.right + s.wrong else "-",
        f"{s.first_right}",
        f"{s.modules_right} of {s.modules}",
        "-" if s.delay is None else f"{s.delay:g}",
        f"{s.alarms} in {s.healthy}",
        f"{s.alarmed}",
        f"{s.crashes}",
    ]
    return " | ".join(cells)


def per_program(results: Sequence[Result]) -> str:
    programs = dict.fromkeys(r.program for r in results if r.faulty)
    lines = ["| program | found | precision | module | delay |", "|---|---|---|---|---|"]
    for program in programs:
        s = summarise(results, lambda r, program=program: r.program == program)
        delay = "-" if s.delay is None else f"{s.delay:g}"
        lines.append(
            f"| {program} | {s.found} of {s.faults} | {s.precision:.0%} | {s.modules_right} of {s.modules} | {delay} |"
        )
    return "\n".join(lines) + "\n"


def per_code(results: Sequence[Result]) -> str:
    best = Counter(r.best for r in results if r.faulty)
    found = Counter(r.best for r in results if r.faulty and r.found)
    right = Counter(seen.codes[0] for r in results for seen in r.right)
    wrong = Counter(seen.codes[0] for r in results for seen in r.wrong)
    lines = ["| code | faults | found | raised rightly | wrongly |", "|---|---|---|---|---|"]
    lines += [
        f"| {_link(code)} | {best[code] or ''} | {found[code] if best[code] else ''} | {right[code]} | {wrong[code]} |"
        for code in sorted({*best, *right, *wrong})
    ]
    return "\n".join(lines) + "\n"


def _link(code: str) -> str:
    exists = (DOCS / "findings" / f"{code}.md").exists()
    return f"[{code}](findings/{code}.md)" if exists else code


def misses(results: Sequence[Result]) -> str:
    lines = []
    for r in (r for r in results if r.faulty and not r.found):
        case = CASES[r.case]
        said = ", ".join(sorted({seen.codes[0] for seen in (*r.right, *r.wrong)})) or "nothing"
        aside = ", ".join(sorted({seen.codes[0] for seen in r.asides if set(seen.codes) & set(case.codes)}))
        lines.append(
            f"- **{r.case}** ({r.program}{', held out' if r.held_out else ''}): {' '.join(case.why.split())} "
            f"Wanted {' or '.join(case.codes)}; said {said}{'; as info ' + aside if aside else ''}."
        )
    return "\n".join(lines or ["None."]) + "\n"


def wrongs(results: Sequence[Result]) -> str:
    lines = [
        f"- {r.case} ({r.program}{', held out' if r.held_out else ''}): {line(seen)}"
        for r in results
        for seen in r.wrong
    ]
    return "\n".join(lines or ["None."]) + "\n"


def line(seen: Seen) -> str:
    where = f" in `{seen.modules[0]}`" if seen.modules[0] else ""
    cause = f" (cause: {seen.cause})" if seen.cause else ""
    return f"{'/'.join(seen.codes)} at step {seen.step}{where}{cause}: {seen.text.splitlines()[0][:200] if seen.text else ''}"


def at_length(observer: str, r: Result) -> str:
    """One result, with everything that was said."""
    case = CASES[r.case]
    verdict = ("FOUND" if r.found else "MISSED") if r.faulty else ("ALARMED" if r.wrong else "QUIET")
    head = f"{verdict} {observer} on {r.case} ({r.program}), {r.seconds:.1f} s: {' '.join(case.why.split())}"
    truth = f"    truth: {case.codes}, modules {case.modules}, step {case.step}" if r.faulty else ""
    body = [f"    {mark} {line(seen)}" for mark, group in (("right", r.right), ("WRONG", r.wrong), ("info ", r.asides)) for seen in group]  # fmt: skip
    return "\n".join(part for part in (head, truth, *body, r.crash) if part)
