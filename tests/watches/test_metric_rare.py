"""Metrics of a validation that are never there, or never again, in runs with few evaluations; lists; terms of a loss."""

from __future__ import annotations

import pytest

from stethoscope import Record
from stethoscope.testing import replay
from stethoscope.watches import MetricSchema

PLAN = [Record("plan/steps", 200.0, 0, source="step")]


def logged(phase, step, **metrics):
    kinds = {type(None): "none", list: "list"}
    return [
        Record(name, value if isinstance(value, float) else None, step, phase=phase, source="log", kind=kinds.get(type(value), "float"))
        for name, value in metrics.items()
    ]  # fmt: skip


def evaluations(values, plan=PLAN, train=None, name="recall"):
    """Said beyond infos, in a run of 200 steps that is evaluated every fifty; `...` leaves the key out."""
    stream = list(plan)
    for i, value in enumerate(values):
        stream += logged("train", 50 * i, **train) if train else []
        stream += logged("val", 50 * i + 49, loss=1.0, **({} if value is ... else {name: value}))
    found = replay(MetricSchema(), stream)
    return [(each.code, each.evidence["metric"], each.step) for each in found if each.severity != "info"]


def test_a_key_of_the_first_evaluation_alone_is_missed_for_half_of_a_planned_run():
    assert evaluations([0.5, ..., ..., ...]) == [("metric-vanished", "recall", 199)]
    assert evaluations([0.5, ..., ..., ...], plan=[]) == []
    assert evaluations([0.5, ..., ..., ...], plan=[PLAN[0]._replace(value=1000.0)]) == []
    assert evaluations([0.5, ..., ..., 0.6]) == []


def test_a_result_that_the_evaluation_adds_and_that_is_always_none_warns():
    assert evaluations([None] * 4) == [("metric-always-none", "recall", 149)]
    assert evaluations([None] * 4, train={"loss": 1.0}) == [("metric-always-none", "recall", 149)]
    # the dictionary of a model without this metric is the same in training
    assert evaluations([None] * 9, train={"loss": 1.0, "recall": None}) == []
    assert evaluations([None] * 9, name="loss_rnnt") == []
    assert evaluations([None, None, None, 0.5], plan=[]) == []


def test_a_share_as_a_list_warns():
    assert evaluations([[0.5, 0.6]] * 4) == [("metric-type", "recall", 49)]
    assert evaluations([[0.5, 0.6]] * 4, name="per_batch") == []


@pytest.mark.parametrize("name", ["objectness_loss", "mean_loss", "loss_ctc", "kl", "ce", "l2_reg"])
def test_a_term_of_the_loss_in_training_alone_is_an_info(name):
    stream = logged("train", 0, loss=1.0, **{name: 0.5}) + logged("train", 1, loss=1.0, **{name: 0.5})
    (found,) = replay(MetricSchema(), stream + logged("val", 1, loss=1.0))
    assert (found.code, found.severity, found.evidence["metric"]) == ("metric-phase-mismatch", "info", name)


@pytest.mark.parametrize(("name", "other"), [("th_accuracy", "wer"), ("objectness_loss", "objectnes_loss")])
def test_a_quality_and_a_loss_of_another_spelling_that_validation_lacks_still_warn(name, other):
    stream = logged("train", 0, loss=1.0, **{name: 0.5}) + logged("train", 1, loss=1.0, **{name: 0.5})
    found = replay(MetricSchema(), stream + logged("val", 1, loss=1.0, **{other: 0.5}))
    loud = [(each.code, each.evidence["metric"]) for each in found if each.severity != "info"]
    assert loud == [("metric-phase-mismatch", name)]
