"""Ready choices of probes and watches: `Monitor(model, **presets.first_aid())`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from stethoscope._parts import mark_preset
from stethoscope.probes import Activations, Gradients, Inputs, Parameters, Separation
from stethoscope.watches import (
    ActivationHealth,
    AnswerHealth,
    Assignment,
    BatchOrder,
    ClassHealth,
    GradientHealth,
    InputDrift,
    InputHealth,
    Jumps,
    LearningRate,
    LossInput,
    MetricSchema,
    NonFinite,
    OutputCollapse,
    Overfit,
    ParameterHealth,
    Plateau,
    ResultHealth,
    TargetHealth,
)

if TYPE_CHECKING:
    from stethoscope._protocols import Probe, Watch


class Preset(TypedDict):
    """Arguments of `Monitor`."""

    probes: tuple[Probe, ...]
    watches: tuple[Watch, ...]


def first_aid() -> Preset:
    """For any model: what activations, gradients and weights look like, where NaN comes from, what the loss does.

    Returns:
        Probes `Activations`, `Gradients`, `Parameters`; watches `NonFinite`, `Jumps` and `Plateau` on the train loss.

    Examples:
        >>> sorted(first_aid())
        ['probes', 'watches']
    """
    return _marked((Activations(), Gradients(), Parameters()), (NonFinite(), Jumps(), Plateau()))


def separation() -> Preset:
    """For source separation: `first_aid` and whether outputs collapse or the assignment (PIT) is ambiguous.

    Give the tensors to the monitor: `monitor.step(loss=loss, estimates=..., references=..., mixture=...)`, each of
    shape (batch, sources, time), the mixture without sources.

    Examples:
        >>> len(separation()["probes"]) - len(first_aid()["probes"])
        1
    """
    base = first_aid()
    return _marked(
        (*base["probes"], Separation()),
        (BatchOrder(), *base["watches"], OutputCollapse(), OutputCollapse(phase="val"), Assignment()),
    )


def full() -> Preset:
    """Everything: `separation`, the health of the network, the data, metric dictionaries given to `log`.

    What has nothing to look at costs nothing, and says so once, as an info.

    Examples:
        >>> len(full()["watches"]) > len(separation()["watches"])
        True
    """
    base = separation()
    health = (
        LossInput(),
        TargetHealth(),
        InputHealth(),
        ParameterHealth(),
        ActivationHealth(),
        GradientHealth(),
    )  # causes before what they explain
    return _marked(
        (*base["probes"], Inputs()),
        (
            *health,
            *base["watches"],
            LearningRate(),
            ClassHealth(),
            AnswerHealth(),
            ResultHealth(),
            Overfit(),
            InputDrift(),
            MetricSchema(),
        ),
    )


def _marked(probes: tuple[Probe, ...], watches: tuple[Watch, ...]) -> Preset:
    for part in (*probes, *watches):
        mark_preset(part)
    return {"probes": probes, "watches": watches}
