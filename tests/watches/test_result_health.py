import math

import pytest

from stethoscope import Record
from stethoscope.testing import replay, series
from stethoscope.watches import ResultHealth


def found(evaluations, start=3.0):
    records = series(loss=[start])
    for step, values in enumerate(evaluations):
        records += [Record(name, value, step, phase="val", source="log") for name, value in values.items()]
    return [f.code for f in replay(ResultHealth(), records)]


LOSSES = [2.0, 1.0, 0.5, 0.3]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("accuracy", [4.0, 9.0, 11.5, 12.0]),  # hits of 16 items
        ("val_acc", [1.2, 3.1, 4.2, 4.5]),  # hits per sentence
    ],
)
def test_an_accuracy_that_contradicts_the_loss_is_no_percentage(name, values):
    assert found([{"loss": x, name: y} for x, y in zip(LOSSES, values, strict=True)]) == ["metric-range"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("accuracy", [100 * math.exp(-x) for x in LOSSES]),
        ("accuracy", [math.exp(-x) for x in LOSSES]),
        ("sentence_accuracy", [1.0, 2.0, 3.0, 4.0]),  # all of many words must be right
        ("wer", [90.0, 60.0, 40.0, 20.0]),
        ("steps", [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_percentages_and_shares_are_fine(name, values):
    assert found([{"loss": x, name: y} for x, y in zip(LOSSES, values, strict=True)]) == []


def test_a_percentage_may_be_low_while_the_loss_is_high():
    assert (
        found(
            [{"loss": x, "accuracy": y} for x, y in zip([6.9, 6.0, 5.5, 5.0], [0.1, 1.5, 3.0, 5.0], strict=True)], 6.9
        )
        == []
    )


@pytest.mark.parametrize(
    ("name", "sign", "codes"),
    [("si_sdr_db", 1, ["loss-sign"]), ("si_sdr_db", -1, []), ("neg_si_sdr", 1, []), ("mse", 1, [])],
)
def test_a_quality_that_is_the_loss_itself_is_minimised(name, sign, codes):
    assert found([{"loss": x, name: sign * x} for x in (-20.0, -25.0, -27.0, -30.0)]) == codes


def test_one_number_in_both_is_no_proof():
    assert found([{"loss": 0.0, "accuracy": 0.0}] * 10) == []
