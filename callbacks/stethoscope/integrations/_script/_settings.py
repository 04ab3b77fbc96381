"""What `stethoscope run` was told, on its way to the processes that train: one environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

VARIABLE = "STETHOSCOPE_RUN"
STARTUP = Path(__file__).parent / "startup"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do in the processes below.

    Args:
        target: the script, module or command, as it was given.
        to: run folder, or a file that ends with `.jsonl`.
        preset: name of a function in `stethoscope.presets`, or `"none"`.
        every: observe a step when `step % every == 0`.
        guard: see `Monitor`.
        planned_steps: see `Monitor`.
        pid: the process that runs a script or module itself; None where the target is a command that starts others.
        start: where `stethoscope run` was called; `to` is meant from there, wherever the script goes.
    """

    target: str
    to: str
    preset: str = "first_aid"
    every: int = 50
    guard: Literal["raise", "skip"] | None = None
    planned_steps: int | None = None
    pid: int | None = None
    start: str = ""

    def environment(self) -> dict[str, str]:
        """Return this process's environment with the settings, and with the folder that Python is to look into first."""
        paths = [str(STARTUP), os.environ.get("PYTHONPATH", "")]
        joined = os.pathsep.join(path for path in paths if path)
        return {**os.environ, "PYTHONPATH": joined, VARIABLE: json.dumps(asdict(self))}

    def place(self, to: str) -> Path:
        """Where `to`, or a path made from it, is."""
        return Path(self.start, to)

    @classmethod
    def found(cls) -> Settings | None:
        """Return what an outer `stethoscope run` has left, if there is one."""
        said = os.environ.get(VARIABLE)
        return cls(**json.loads(said)) if said else None
