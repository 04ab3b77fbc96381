"""All faults, all healthy runs, all observers."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from faults import (
    autoencoder,
    classifier,
    enhancement,
    forecaster,
    language,
    recogniser,
    retrieval,
    segmenter,
    separation,
    tabular,
    translator,
)
from faults._fault import Fault, Healthy
from faults.observer_numbers import TrainingDoctor, Trainpulse
from faults.observer_ours import Ours
from faults.observer_torch_audit import TorchAudit
from faults.observer_torchlens import TorchLens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAMS = (
    classifier,
    autoencoder,
    language,
    separation,
    recogniser,
    enhancement,
    forecaster,
    retrieval,
    tabular,
    segmenter,
    translator,
)
FOLDERS = ("written", "blind_1", "blind_2", "blind_3", "blind_4")
"""Those written beside the watches, then those written by people who had not seen a watch; the last are held out."""


def defined(folder: str) -> Iterator[object]:
    """Everything that the files of a folder define, in the order of their names."""
    for file in pkgutil.iter_modules([str(Path(__file__).parent / folder)]):
        yield from vars(import_module(f"faults.{folder}.{file.name}")).values()


DEFINED = tuple(chain.from_iterable(map(defined, FOLDERS)))
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
