"""The truth about the cases that are kept apart can be read: codes have pages, modules exist, the new program learns."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from faults import last_healthy, retrieval
from faults._cost import Nobody
from faults.cases import FAULTS, HEALTHY, PROGRAMS

APART = [fault for fault in FAULTS if fault.apply.__module__.startswith(("faults.apart_", "faults.last_"))]
PAGES = {page.stem for page in (Path(__file__).parents[1] / "docs" / "findings").glob("*.md")}


class Listens(Nobody):
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, object]] = []

    def phase(self, name: str):
        return nullcontext()

    def log(self, metrics, phase: str, step: int) -> None:
        self.metrics.append(dict(metrics))


def test_cases_that_nobody_has_run_are_held_out():
    last = [fault for fault in FAULTS if fault.apply.__module__.startswith("faults.last_")]
    assert {fault.program for fault in last} == set(PROGRAMS)
    assert all(fault.held_out for fault in last)
    assert all(case.held_out for case in HEALTHY if case.build.__module__ == last_healthy.__name__)


def test_cases_that_were_run_once_are_held_out_no_more():
    run = [fault for fault in FAULTS if fault.apply.__module__.startswith("faults.apart_")]
    assert len(run) == 80
    assert not any(fault.held_out for fault in run)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_code_of_a_fault_has_a_page(fault):
    assert {*fault.codes, *fault.then} <= PAGES


@pytest.mark.parametrize("fault", APART, ids=lambda fault: fault.name)
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
