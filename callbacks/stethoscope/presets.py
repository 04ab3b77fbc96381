"""Ready choices of probes and watches: `Monitor(model, **presets.first_aid())`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from stethoscope._parts import mark_preset
from stethoscope.probes import Activations, Gradients, Parameters
from stethoscope.watches import NonFinite

if TYPE_CHECKING:
    from stethoscope._protocols import Probe, Watch


class Preset(TypedDict):
    """Arguments of `Monitor`."""

    probes: tuple[Probe, ...]
    watches: tuple[Watch, ...]


def first_aid() -> Preset:
    """For any model: statistics of activations, gradients and weights, and where NaN and Inf come from.

    Example:
        >>> sorted(first_aid())
        ['probes', 'watches']
    """
    return _marked((Activations(), Gradients(), Parameters()), (NonFinite(),))


def _marked(probes: tuple[Probe, ...], watches: tuple[Watch, ...]) -> Preset:
    for part in (*probes, *watches):
        mark_preset(part)
    return {"probes": probes, "watches": watches}
