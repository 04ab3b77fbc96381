import pytest

from stethoscope.watches import unknown_monitors

KNOWN = {"train": ["train_loss", "lr"], "val": ["val_loss", "val_acc"]}


def test_what_is_logged_is_known():
    assert unknown_monitors([("EarlyStopping", "val_loss"), ("plateau", "train_loss")], KNOWN) == []


@pytest.mark.parametrize(("key", "nearest"), [("val_los", "val_loss"), ("val/loss", "val_loss"), ("val_wer", None)])
def test_what_nothing_logs_is_said_with_the_nearest_name(key, nearest):
    (found,) = unknown_monitors([("EarlyStopping", key)], KNOWN)
    assert (found.code, found.severity, found.evidence["who"]) == ("metric-monitor-unknown", "warning", "EarlyStopping")
    assert found.evidence.get("nearest") == nearest
    assert repr(key) in found.message


def test_nothing_is_said_before_the_phase_has_logged():
    assert unknown_monitors([("a", "val_los"), ("b", "los")], {"train": ["train_loss"]}) == []
    assert unknown_monitors([("a", "val_los")], {}) == []
    assert unknown_monitors([("a", "val_los")], {"train": ["train_loss"], "val": []}) == []
