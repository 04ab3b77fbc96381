"""The truth about the cases that are kept apart can be read: codes have pages, modules exist, the new program learns."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from faults import retrieval
from faults._cost import Nobody
from faults.cases import FAULTS

PAGES = {page.stem for page in (Path(__file__).parents[1] / "docs" / "findings").glob("*.md")}


class Listens(Nobody):
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, object]] = []

    def phase(self, name: str):
        return nullcontext()

    def log(self, metrics, phase: str, step: int) -> None:
        self.metrics.append(dict(metrics))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_code_of_a_fault_has_a_page(fault):
    assert {*fault.codes, *fault.then} <= PAGES


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_guilty_module_exists(fault):
    torch.manual_seed(0)
    names = {name for name, _ in fault.build().model.named_modules()}
    assert set(fault.modules) <= names


def test_retrieval_learns():
    torch.set_num_threads(1)
    training, listens = retrieval.build(2), Listens()
    training.steps, training.val_every = 150, 150
    losses = training.run(listens)
    assert losses[-1] < 0.3 * losses[0]
    assert listens.metrics[-1]["recall@1"] > 0.6
