import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stethoscope import Record
from stethoscope.aggregate import Mean, updates
from stethoscope.testing import replay
from stethoscope.watches import Field, MetricSchema
from stethoscope.watches._metric_means import Tally


def cv(batches, *, start=0, count_nan=False):
    """The means of `Executor.cv`: a denominator that starts at `start`, NaN batches left out of the sum."""
    total, seen = 0.0, start
    for value, utterances in batches:
        if math.isfinite(value):
            total += value * utterances
        if math.isfinite(value) or count_nan:
            seen += utterances
    return total / seen


BATCHES = [(26.31, 2), (27.12, 3), (26.88, 1)]


def shown(batches, value, *, weighted=True):
    schema = MetricSchema(
        {"loss": Field(finite=False), "epoch_loss": Field(mean_of="loss", weight="n" if weighted else "")}
    )
    records = [
        record
        for step, (loss, n) in enumerate(batches)
        for record in (
            Record("loss", loss, step, phase="cv", source="log"),
            Record("n", float(n), step, phase="cv", source="log", kind="int"),
        )
    ]
    return replay(schema, [*records, Record("epoch_loss", value, len(batches), phase="cv", source="log")])


def test_an_honest_mean_is_left_alone():
    assert shown(BATCHES, cv(BATCHES)) == []
    assert shown(BATCHES, cv(BATCHES), weighted=False) == []
    assert shown(BATCHES, sum(value for value, _ in BATCHES) / 3, weighted=False) == []


def test_a_denominator_that_starts_at_one_is_found():
    lie = cv(BATCHES, start=1)
    assert lie == pytest.approx(22.98, abs=0.1)
    (found,) = shown(BATCHES, lie)
    assert (found.code, found.severity, found.step) == ("metric-aggregate", "warning", 3)
    assert "its denominator starts at 1" in found.message
    (found,) = shown(BATCHES, lie, weighted=False)
    assert "shown is" in found.message


def test_nan_batches_that_are_counted_are_found():
    batches = [*BATCHES, (math.nan, 4)]
    (found,) = shown(batches, cv(batches, count_nan=True))
    assert "counts 1 non-finite batches that its sum leaves out" in found.message
    (found,) = shown(batches, cv(batches, start=1, count_nan=True))
    assert "starts at 1 and counts" in found.message
    assert shown(batches, cv(batches)) == []
    assert shown(batches, math.nan) == []


def test_a_sum_is_told_from_a_mean():
    (found,) = shown(BATCHES, sum(value * n for value, n in BATCHES))
    assert "it is the sum" in found.message


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 100)), min_size=1, max_size=20))
def test_the_mean_of_any_batches_is_honest(batches):
    mean = math.fsum(value * n for value, n in batches) / sum(n for _, n in batches)
    assert shown(batches, mean) == []
    ours = Mean()
    for value, n in batches:
        ours.add({"loss": torch.tensor(value)}, weight=n)
    largest = max(abs(value) for value, _ in batches)
    assert float(ours.result()["loss"]) == pytest.approx(mean, abs=1e-12 * largest + 1e-300)
    assert ours.check({"loss": mean}).ok


def test_a_nan_batch_makes_the_mean_nan_or_is_counted():
    for policy, expected in (("propagate", math.nan), ("skip", 2.0)):
        mean = Mean(nonfinite=policy)
        mean.add({"loss": torch.tensor(1.0), "acc": None}, weight=2)
        mean.add({"loss": torch.tensor(math.nan), "acc": None}, weight=5)
        mean.add({"loss": 3.0}, weight=torch.tensor(2))
        assert float(mean.result()["loss"]) == pytest.approx(expected, nan_ok=True)
        assert mean.result()["acc"] is None
        assert float(mean.skipped()["loss"]) == 1.0


def test_adding_waits_for_nothing_and_keeps_no_graph():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # raises as soon as a value is asked for
        mean = Mean()
        for _ in range(3):
            mean.add({"loss": torch.ones(1), "acc": torch.ones(())}, weight=torch.ones(()))
        mean.result()
    mean = Mean()
    mean.add({"loss": torch.ones(1, requires_grad=True) * 2})
    assert not mean.result()["loss"].requires_grad


def test_the_mean_agrees_with_torchmetrics():
    from torchmetrics import MeanMetric

    theirs, ours = MeanMetric(nan_strategy="ignore"), Mean(nonfinite="skip")
    for value, n in [*BATCHES, (math.nan, 7)]:
        theirs.update(value, n)
        ours.add({"loss": value}, weight=n)
    assert float(ours.result()["loss"]) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_somebody_elses_mean_can_be_checked():
    mean = Mean()
    for value, n in BATCHES:
        mean.add({"loss": value, "acc": 0.5}, weight=n)
    report = mean.check({"loss": cv(BATCHES, start=1), "acc": 0.5, "other": 1.0, "none": None}, phase="cv")
    (found,) = report.findings
    assert (found.code, found.phase, found.evidence["metric"]) == ("metric-aggregate", "cv", "loss")


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="Legal: 'propagate', 'skip'"):
        Mean(nonfinite="ignore")


def test_updates_that_were_skipped_while_the_counter_went_on_are_found():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    for value in (1.0, math.nan, math.nan, 1.0):
        weight.grad = torch.full((3,), value)
        if torch.isfinite(weight.grad).all():
            optimizer.step()
    (found,) = updates(optimizer, steps=4).findings
    assert found.code == "metric-aggregate"
    assert "2 of 4 counted steps made no update" in found.message
    assert updates(optimizer, steps=2).ok
    assert "no step" in updates(torch.optim.SGD([weight]), steps=4).summary


def test_a_mean_that_was_rounded_for_display_is_honest():
    tally = Tally().add(0.121, 3).add(0.126, 4)
    mean = tally.total / tally.weight
    assert tally.disagreement(round(mean, 3)) == tally.disagreement(round(mean, 2)) == ""
    assert "starts at 1" in tally.disagreement(round(tally.total / (tally.weight + 1), 3))
