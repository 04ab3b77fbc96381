"""All faults, all healthy runs, all observers."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from faults._fault import Fault, Healthy
from faults.observer_numbers import TrainingDoctor, Trainpulse
from faults.observer_ours import Ours
from faults.observer_torch_audit import TorchAudit
from faults.observer_torchlens import TorchLens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType


def files(package: str) -> Iterator[ModuleType]:
    """The modules of a package that are not machinery, in the order of their names."""
    for file in pkgutil.iter_modules(import_module(package).__path__):
        if file.name != "cases" and not file.name.startswith("_"):
            yield import_module(f"{package}.{file.name}")


PROGRAMS = tuple(file for file in files("faults") if hasattr(file, "build"))
FOLDERS = ("written", "blind_1", "blind_2", "blind_3", "blind_4", "blind_5", "blind_6", "blind_7")
"""Those written beside the watches, then those written by people who had not seen a watch; the last two are held out."""

DEFINED = tuple(value for folder in FOLDERS for file in files(f"faults.{folder}") for value in vars(file).values())
FAULTS = tuple(value for value in DEFINED if isinstance(value, Fault))
HEALTHY = tuple(value for value in DEFINED if isinstance(value, Healthy))
CASES: dict[str, Fault | Healthy] = {case.name: case for case in (*FAULTS, *HEALTHY)}

OBSERVERS: dict[str, Callable[[], object]] = {
    o.name: o for o in (Ours, TorchAudit, TorchLens, Trainpulse, TrainingDoctor)
}
PACKAGES = {
    "torch-audit": ("torch_audit", "torch-audit"),
    "TorchLens checks": ("torchlens", "torchlens"),
    "trainpulse": ("trainpulse", "trainpulse"),
    "training-doctor": ("training_doctor", "training-doctor"),
}
"""Import name and distribution of each peer."""


def installed(observer: str) -> bool:
    """Whether an observer can be tried here."""
    return observer not in PACKAGES or find_spec(PACKAGES[observer][0]) is not None
