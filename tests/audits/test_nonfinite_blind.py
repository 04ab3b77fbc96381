"""The audit on runs that were written without a look at it: nonfinite_corpus, in which every fault's truth is exact."""

import sys
from pathlib import Path

import pytest

from stethoscope.audits import nonfinite

sys.path.insert(0, str(Path(__file__).parent))
from nonfinite_corpus import FAULTS, HEALTHY, optimizers

# what torch says of nested tensors, empty means and deprecated modes is not what is tested
pytestmark = pytest.mark.filterwarnings("ignore")


def audit(case):
    run = case()
    with run.context():
        return nonfinite(run.model, *run.args, loss=run.loss, **run.kwargs)


def names(cases):
    return [f"{model}: {case.name}" for model, case in cases]


@pytest.mark.parametrize("case", [case for _, case in FAULTS], ids=names(FAULTS))
def test_the_culprit_is_named(case):
    report = audit(case)
    assert not case.truth.wrong(report), report


@pytest.mark.parametrize("case", [case for _, case in HEALTHY], ids=names(HEALTHY))
def test_a_healthy_run_has_no_findings(case):
    report = audit(case)
    assert not report.findings, report
    assert report.origin is None


@pytest.mark.parametrize("training", optimizers.FAULTS, ids=lambda training: training.__name__)
def test_the_write_of_the_optimizer_is_named(training):
    assert not optimizers.FAULTS[training].wrong(training().findings())


@pytest.mark.parametrize("training", optimizers.HEALTHY, ids=lambda training: training.__name__)
def test_a_healthy_training_has_no_findings(training):
    assert training().findings() == []


def test_the_corpus_is_as_large_as_the_documentation_says():
    assert (len(FAULTS) + len(optimizers.FAULTS), len(HEALTHY) + len(optimizers.HEALTHY)) == (128, 66)
