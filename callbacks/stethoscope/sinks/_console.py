"""Prints findings as they come, and a summary."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console as RichConsole
    from rich.text import Text

    from stethoscope._protocols import Run
    from stethoscope._record import Finding, Record

_STYLE = {"info": "cyan", "warning": "yellow", "error": "bold red"}


@dataclass(eq=False)
class Console:
    """Prints each finding when it comes, and at the end the steps, the last loss and the findings by code.

    Names of modules and other text from outside are shown as they are: no markup, no control characters. Ranks other than
    0 print when they have found something, and are silent otherwise.

    Args:
        file: where to print; None is standard output.

    Examples:
        >>> from stethoscope import Finding
        >>> from stethoscope._protocols import Run
        >>> sink = Console()
        >>> sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
        >>> sink.write(3, [], [Finding("nonfinite-loss", "error", "The loss is NaN.", "Look at the batch.", step=3)])
        error nonfinite-loss  step 3
          The loss is NaN.
          Try: Look at the batch.
    """

    file: IO[str] | None = None
    _console: RichConsole | None = field(default=None, init=False, repr=False)
    _rank: int = field(default=0, init=False, repr=False)
    _steps: tuple[int, int] | None = field(default=None, init=False, repr=False)
    _loss: float | None = field(default=None, init=False, repr=False)
    _findings: defaultdict[str, list[Finding]] = field(
        default_factory=lambda: defaultdict[str, "list[Finding]"](list), init=False, repr=False
    )

    def open(self, run: Run) -> None:
        """Start with an empty summary."""
        # Importing rich draws a number from Python's generator, which belongs to the training.
        state = random.getstate()
        from rich.console import Console as RichConsole

        random.setstate(state)
        self._console = RichConsole(file=self.file, highlight=False, markup=False, emoji=False)
        self._steps = self._loss = None
        self._rank = run.rank
        self._findings.clear()

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Print the findings."""
        if self._console is None:
            raise RuntimeError("Console is not open: call open(run) before write(...).")
        self._steps = (self._steps[0] if self._steps else step, step)
        for record in records:
            if record.source == "step" and record.name == "loss" and isinstance(record.value, float | int):
                self._loss = record.value
        for finding in findings:
            self._findings[finding.code].append(finding)
            self._print(self._console, _finding(finding, self._console.width))

    def close(self) -> None:
        """Print the summary."""
        console, self._console = self._console, None
        if console is not None and (self._findings or (self._steps is not None and not self._rank)):
            for line in self._summary():
                self._print(console, line)

    def _print(self, console: RichConsole, text: Text) -> None:
        # A progress bar of rich puts itself in place of sys.stdout, to print above itself; RichConsole goes around it.
        with console.capture() as printed:
            console.print(text)
        file = self.file or sys.stdout
        file.write(printed.get())
        file.flush()

    def _summary(self) -> list[Text]:
        from rich.text import Text

        number = sum(len(findings) for findings in self._findings.values())
        facts = [f"rank {self._rank}"] if self._rank else []
        facts += [f"steps {self._steps[0]} to {self._steps[1]}"] if self._steps else []
        facts += [f"last loss {self._loss:.4g}"] if self._loss is not None else []
        facts += [f"{number} finding{'s' if number != 1 else ''}"] if number else ["no findings"]
        lines = [Text(f"stethoscope: {', '.join(facts)}", style="bold")]
        for code, findings in self._findings.items():
            first = findings[0]
            where = f", first in {first.module}" if first.module else ""
            when = f", first at step {first.step}" if first.step is not None else ""
            line = f"  {len(findings):>4} x {code}{when}{where}"
            lines.append(Text(_plain(line), style=_STYLE[first.severity]))
        return lines


def _finding(finding: Finding, width: int) -> Text:
    from textwrap import wrap

    from rich.text import Text

    where = [f"step {finding.step}"] if finding.step is not None else []
    where += [finding.module] if finding.module else []
    where += [f"({finding.phase})"] if finding.phase != "train" else []
    where += [f"rank {finding.rank}"] if finding.rank else []
    text = Text(f"{finding.severity} {finding.code}", style=_STYLE[finding.severity])
    text.append(_plain("  " + "  ".join(where)) if where else "", style="not bold default")
    cause = f"Explained by {finding.cause}." if finding.cause else ""
    advice = f"Try: {finding.advice}" if finding.advice else ""
    for line in (finding.message, cause, advice):
        if line:
            parts = [part for whole in line.splitlines() for part in wrap(_plain(whole), max(width - 2, 20))]
            text.append("".join(f"\n  {part}" for part in parts), style="not bold default")
    return text


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
