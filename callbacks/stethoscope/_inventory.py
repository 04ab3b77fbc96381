"""Is the model still the one that probes were attached to?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope._tree import plain

if TYPE_CHECKING:
    from torch import nn

EVERY = 50
"""Steps between two looks: one takes about 2 us per module."""


class Inventory:
    """The parameters of a model at set-up, to be compared with those that it has later.

    Probes keep to the modules and parameters that they have found. Modules without parameters are left out: a new
    activation function is no reason for a warning.

    Args:
        model: unwrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = {parameter: plain(name) for name, parameter in model.named_parameters()}

    def compare(self, step: int) -> list[Finding]:
        """Say what was added and what is gone since the last look, at every 50th step."""
        if step % EVERY:
            return []
        now = {parameter: plain(name) for name, parameter in self._model.named_parameters()}
        added = [name for parameter, name in now.items() if parameter not in self._known]
        gone = [name for parameter, name in self._known.items() if parameter not in now]
        self._known = now
        if not added and not gone:
            return []
        what = [
            f"{len(names)} were {kind} ({_some(names)})"
            for kind, names in (("added", added), ("removed", gone))
            if names
        ]
        return [
            Finding(
                "model-changed",
                "warning",
                f"The model's parameters are not those that the monitor has found at set-up: {' and '.join(what)}. Nothing is read of new "
                "ones, and what is recorded of removed ones is about tensors that the model does not use any more.",
                "Create the monitor after the model is complete (weight_norm, adapters, sharding, grown layers); or close this one and "
                "create another, with load_state_dict(old.state_dict()), to go on with its steps.",
                step,
                module=(added or gone)[0].rpartition(".")[0],
                evidence={"added": added[:100], "removed": gone[:100]},
            )
        ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
