"""What the statistics are called on a page, and what they mean."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Words(NamedTuple):
    """How a record's name is told to a reader.

    Args:
        label: a title.
        unit: of the values; `""` where it is 1 or that of the model's own values.
        meaning: half a sentence; `""` where the name says it.
    """

    label: str
    unit: str = ""
    meaning: str = ""


_KNOWN = {
    "activation/rms": Words("Activation rms", "", "root mean square of what each layer returns"),
    "activation/mean": Words("Activation mean", "", "mean of what each layer returns"),
    "activation/min": Words("Activation minimum", "", "smallest value that each layer returns"),
    "activation/max": Words("Activation maximum", "", "largest value that each layer returns"),
    "activation/absmax": Words("Activation absmax", "", "largest magnitude that each layer returns"),
    "activation/std": Words("Activation standard deviation", "", "of what each layer returns"),
    "activation/kurtosis": Words(
        "Activation kurtosis", "", "3 for a normal distribution; large means rare, huge values"
    ),
    "activation/zero_fraction": Words("Activation zeros", "share", "share of exact zeros in what each layer returns"),
    "activation/nonfinite": Words("Activation NaN or Inf", "flag", "1: holds Inf, 2: holds NaN"),
    "activation/input_rms": Words("Input rms", "", "root mean square of what each layer is given"),
    "activation/histogram": Words("Activations", "share", "share of a layer's values in each bin"),
    "gradient/norm": Words("Gradient norm", "", "2-norm of the gradient of each parameter, before clipping"),
    "gradient/nonfinite": Words("NaN and Inf in gradients", "values", "number of NaN and Inf values"),
    "parameter/norm": Words("Weight norm", "", "2-norm of each parameter"),
    "parameter/update_ratio": Words(
        "Update ratio", "", "norm of the step's change relative to the norm of the parameter; about 0.001 is usual"
    ),
    "parameter/unchanged": Words("Weights unchanged", "flag", "1: the step has changed nothing"),
    "loss": Words("Loss"),
    "lr": Words("Learning rate"),
}
_UNITS = {"_db": "dB", "_s": "s", "_ms": "ms", "_bytes": "bytes", "_hz": "Hz", "_fraction": "share"}

ORDER = (
    "activation/rms",
    "gradient/norm",
    "parameter/update_ratio",
    "activation/zero_fraction",
    "activation/absmax",
    "activation/max",
    "activation/min",
    "activation/mean",
    "activation/std",
    "parameter/norm",
    "activation/nonfinite",
    "activation/input_rms",
    "parameter/unchanged",
)
"""Statistics of layers, the most telling first; others follow."""


def words(name: str) -> Words:
    """Tell what a record's name stands for.

    Examples:
        >>> words("separation/si_sdr_db")
        Words(label='separation: si sdr', unit='dB', meaning='')
        >>> words("gradient/norm").label, words("activation/input_rms.1").label
        ('Gradient norm', 'Input rms, argument 2')
    """
    if name in _KNOWN:
        return _KNOWN[name]
    further = re.fullmatch(r"(activation/input_\w+)\.(\d+)", name)  # of a layer that takes several tensors
    if further:
        label, unit, meaning = words(further[1])
        return Words(f"{label}, argument {int(further[2]) + 1}", unit, meaning)
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    ending = next((ending for ending in _UNITS if unit and name.endswith(ending)), "")
    group, _, statistic = name.removesuffix(ending if unit != "share" else "").rpartition("/")
    label = f"{group}: {statistic.replace('_', ' ')}" if group else statistic
    return Words(label, unit)


def titled(name: str, phase: str) -> str:
    """Give the label with its unit, and the phase where it is not training.

    Examples:
        >>> titled("separation/si_sdr_db", "val")
        'separation: si sdr (dB), val'
    """
    label, unit, _ = words(name)
    return f"{label}{f' ({unit})' if unit else ''}{f', {phase}' if phase != 'train' else ''}"


def number(value: float) -> str:
    """Write a number with three significant digits.

    Examples:
        >>> number(0.000123456), number(1234567.0), number(float("nan"))
        ('0.000123', '1.23e+06', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    return f"{value:.3g}" if math.isfinite(value) else "Inf" if value > 0 else "-Inf"


def plural(count: int, thing: str) -> str:
    """Count things.

    Examples:
        >>> plural(1, "warning"), plural(2, "warning")
        ('1 warning', '2 warnings')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
