"""What the callbacks of all frameworks take: a preset by its name, and what goes before it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from stethoscope import presets
from stethoscope._monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, Watch


def monitor_options(
    preset: str | None,
    probes: Sequence[Probe],
    watches: Sequence[Watch],
    sinks: Any,
    every: int,
    guard: str | None,
    planned_steps: int | None,
) -> dict[str, Any]:
    """Return the arguments of `Monitor` except for sinks and guard. A probe goes before the preset's one of its class.

    Whoever made a mistake hears of it here, not when the trainer has loaded all data.

    Raises:
        TypeError: a part that is none.
        ValueError: no such preset, or an argument that `Monitor` does not accept.

    Example:
        >>> options = monitor_options("first_aid", (), (), None, 50, None, None)
        >>> sorted(options)
        ['every', 'planned_steps', 'probes', 'watches']
    """
    chosen: presets.Preset = _preset(preset) if preset is not None else {"probes": (), "watches": ()}
    options: dict[str, Any] = {
        "probes": [*(each for each in chosen["probes"] if type(each) not in map(type, probes)), *probes],
        "watches": [*(each for each in chosen["watches"] if each not in watches), *watches],
        "every": every,
        "planned_steps": planned_steps,
    }
    if guard not in (None, "raise", "skip"):
        raise ValueError(f"guard must be None, 'raise' or 'skip', got {guard!r}.")
    Monitor(nn.Identity(), sinks=() if sinks is None else sinks, **options)
    return options


def _preset(name: str) -> presets.Preset:
    known = {
        each: function
        for each, function in inspect.getmembers(presets, inspect.isfunction)
        if function.__module__ == presets.__name__ and not each.startswith("_")
    }
    if name not in known:
        raise ValueError(f"Unknown preset {name!r}. Known: {sorted(known)}; None for no preset.")
    preset: presets.Preset = known[name]()
    return preset
