"""Runs of ten kinds of small models with a mistake in each, and healthy ones that look wrong; written without a look at the audit."""

from . import conv, corners, diffusion, enhancement, experts, graph, language, masks, separation, speech, vae
from ._case import Case, Run, cases

CASES = [
    (model.__name__.rpartition(".")[2], case)
    for model in (conv, language, vae, separation, speech, graph, enhancement, diffusion, experts, corners, masks)
    for case in cases(vars(model))
]
FAULTS = [(model, case) for model, case in CASES if case.truth is not None]
HEALTHY = [(model, case) for model, case in CASES if case.truth is None]

__all__ = ["CASES", "FAULTS", "HEALTHY", "Case", "Run"]
