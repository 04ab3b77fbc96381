"""All faults, all healthy runs, all observers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from faults import (
    apart_autoencoder,
    apart_classifier,
    apart_enhancement,
    apart_forecaster,
    apart_healthy_a,
    apart_healthy_b,
    apart_language,
    apart_recogniser,
    apart_retrieval,
    apart_separation,
    autoencoder,
    autoencoder_faults,
    classifier,
    classifier_faults,
    enhancement,
    enhancement_faults,
    forecaster,
    healthy,
    healthy_lookalikes,
    language,
    language_faults,
    last_autoencoder,
    last_classifier,
    last_enhancement,
    last_forecaster,
    last_healthy,
    last_language,
    last_recogniser,
    last_retrieval,
    last_separation,
    recogniser,
    recogniser_faults,
    retrieval,
    separation,
    separation_faults,
)
from faults._fault import Fault, Healthy
from faults.observer_numbers import TrainingDoctor, Trainpulse
from faults.observer_ours import Ours
from faults.observer_torch_audit import TorchAudit
from faults.observer_torchlens import TorchLens

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS = (classifier, autoencoder, language, separation, recogniser, enhancement, forecaster, retrieval)
FAULTS = tuple(
    value
    for module in (
        classifier_faults,
        autoencoder_faults,
        language_faults,
        separation_faults,
        recogniser_faults,
        enhancement_faults,
        apart_classifier,
        apart_language,
        apart_recogniser,
        apart_forecaster,
        apart_autoencoder,
        apart_separation,
        apart_enhancement,
        apart_retrieval,
        last_classifier,
        last_autoencoder,
        last_language,
        last_separation,
        last_recogniser,
        last_enhancement,
        last_forecaster,
        last_retrieval,
    )
    for value in vars(module).values()
    if isinstance(value, Fault)
)
HEALTHY = tuple(
    value
    for module in (healthy, healthy_lookalikes, apart_healthy_a, apart_healthy_b, last_healthy)
    for value in vars(module).values()
    if isinstance(value, Healthy)
)
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
