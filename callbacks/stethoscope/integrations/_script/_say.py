"""What `stethoscope run` says: to standard error, when the script is over."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._record import Finding
    from stethoscope.integrations._script._session import Session
    from stethoscope.integrations._script._settings import Settings

_SEVERITIES = ("error", "warning", "info")


def is_main(settings: Settings) -> bool:
    """Whether this is the process that was asked to run a script, not one that the script has started."""
    return settings.pid == os.getpid()


def sessions(settings: Settings, over: Sequence[Session]) -> None:
    """Say where the records are, the worst finding of each model, and what to do next. Other ranks speak of findings only."""
    for session in over:
        run, findings = session.run, session.findings
        steps = f"{session.steps} step{'s' * (session.steps != 1)}"
        if run.rank == 0:
            written = session.to if session.written else "nowhere: it could not be written to " + session.to
            say(f"{steps} of {session.name}: {written}")
        elif worst(findings):
            say(f"rank {run.rank}, {steps} of {session.name}:")
        if run.rank == 0 or worst(findings):
            say(worst(findings) or "nothing was found.")
    if any(session.run.rank == 0 and session.written for session in over):
        say(f"see more: stethoscope report {settings.to}")


def worst(findings: Sequence[Finding]) -> str:
    """Return the first of the worst findings, of whichever rank, in words; none where there are but infos.

    Examples:
        >>> from stethoscope import Finding
        >>> worst([Finding("loss-spike", "warning", "m", "a", step=3), Finding("nonfinite-loss", "error", "m", "a", step=4)])
        'of 2 findings, the worst: error nonfinite-loss at step 4: m Try: a'
    """
    counted = [each for each in findings if each.severity != "info"]
    if not counted:
        return ""
    first = min(counted, key=lambda each: (_SEVERITIES.index(each.severity), bool(each.cause), each.step or 0))
    return str(first) if len(counted) == 1 else f"of {len(counted)} findings, the worst: {first}"


def nothing(settings: Settings) -> None:
    """Say once that no training was seen; processes that the script has started may have left something."""
    if settings.place(settings.to).exists():
        say(f"the processes that {settings.target} has started wrote to {settings.to}")
    else:
        say(
            f"no training was seen in {settings.target}: no optimizer of torch.optim made a step with parameters of a "
            "module that was called in train mode, and nothing was recorded."
        )


def say(line: str) -> None:
    """Write a line to standard error. Whoever closed it does not want to hear it."""
    try:
        sys.stderr.write(f"stethoscope: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass
