import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor
from stethoscope._record import Record
from stethoscope.testing import replay
from stethoscope.watches import InputDrift

RATE = 8000


def train_and_validate(change, seed=0, rounds=1):
    """A real loop: speech-like noise in training, changed in validation."""
    generator = torch.Generator().manual_seed(seed)

    def batch():
        x = torch.randn(4, 2001, generator=generator)
        return 0.05 * (x[:, 1:] + 0.9 * x[:, :-1]) * (0.8 + 0.4 * torch.rand(4, 1, generator=generator))

    model = nn.Conv1d(1, 1, 3)
    found = []
    with Monitor(model, watches=[InputDrift()], every=1, on_finding=found.append, strict=True) as monitor:
        for _ in range(rounds):
            for _ in range(8):
                model(batch().unsqueeze(1))
                monitor.step()
            with monitor.phase("val"):
                for _ in range(3):
                    model(change(batch()).unsqueeze(1))
    return found


HEALTHY = {
    "the same": lambda x: x,
    "a little louder": lambda x: 1.5 * x,
    "longer": lambda x: x.repeat(1, 2),
    "shorter": lambda x: x[:, :1000],
    "slightly filtered": lambda x: x + 0.1 * x.roll(1, -1),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_validation_gives_no_finding(name):
    assert train_and_validate(HEALTHY[name]) == []


DRIFTS = {
    "int16 scale": (lambda x: x * 32768, "level", "warning"),
    "quiet": (lambda x: x / 10, "level", "warning"),
    "offset": (lambda x: x + 0.1, "mean", "warning"),
    "upsampled by four": (lambda x: nn.functional.interpolate(x[:, None], scale_factor=4, mode="linear")[:, 0], "roughness", "warning"),
    "silent items": (lambda x: x * torch.tensor([[0.0], [0.0], [1.4], [1.4]]), "share of constant items", "warning"),
    "much longer": (lambda x: x.repeat(1, 8), "length", "info"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRIFTS)
def test_drift_is_named_by_its_quantity(name):
    change, quantity, severity = DRIFTS[name]
    found = train_and_validate(change)
    assert {finding.code for finding in found} == {"input-drift"}
    named = [finding for finding in found if quantity in finding.message]
    assert len(named) == 1
    assert named[0].severity == severity
    assert named[0].phase == "val"
    assert named[0].step == 7


def test_a_lasting_drift_is_said_once():
    found = train_and_validate(lambda x: x * 100, rounds=3)
    assert len([finding for finding in found if "level" in finding.message]) == 1


def test_too_few_observations_say_nothing():
    records = [Record("input/rms", 0.1, step) for step in range(4)]
    assert replay(InputDrift(), [*records, Record("input/rms", 9.0, 4, phase="val")]) == []


def test_a_wide_spread_in_training_is_respected():
    values = [0.001, 1.0, 0.01, 0.5, 0.003, 2.0, 0.02]
    records = [Record("input/rms", value, step) for step, value in enumerate(values)]
    assert replay(InputDrift(), [*records, Record("input/rms", 5.0, 6, phase="val")]) == []


def test_constant_batches_in_training_are_said_when_they_begin():
    values = [0.0, 1.0, 1.0, 0.0, 0.5]
    records = [Record("input/constant", value, step) for step, value in enumerate(values)]
    found = replay(InputDrift(), records)
    assert [(finding.code, finding.step) for finding in found] == [("input-constant", 1), ("input-constant", 4)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["input/rms", "input/mean", "input/length.mask", "input/constant", "loss"]),
            st.one_of(st.none(), st.floats()),
            st.sampled_from(["train", "val"]),
        ),
        max_size=50,
    )
)
def test_any_records_are_survived_and_the_state_is_json(rows):
    watch, found = InputDrift(), []
    state = watch.init()
    for step, (name, value, phase) in enumerate(rows):
        state, findings = watch.update(
            json.loads(json.dumps(state)), [Record(name, value, step, phase=phase), Record("loss", 1.0, step)]
        )
        found += findings
    assert all(0 <= finding.step < len(rows) for finding in found)


def table(change, rounds=3, columns=6):
    torch.manual_seed(0)
    model, found = nn.Linear(columns, 1), []
    spread = torch.linspace(0.2, 3.0, columns)
    with Monitor(model, watches=[InputDrift()], every=1, on_finding=found.append, strict=True) as monitor:
        for _ in range(rounds):
            for _ in range(10):
                model(spread * torch.randn(64, columns))
                monitor.step()
            with monitor.phase("val"), torch.no_grad():
                for _ in range(3):
                    model(change(spread * torch.randn(64, columns)))
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.flip(1), "another spread"),
        (lambda x: torch.cat([x[:, :2] * 4, x[:, 2:]], 1), "33% of the columns"),
        (lambda x: torch.cat([x[:, :1] * 12, x[:, 1:]], 1), "by up to"),
        (lambda x: torch.cat([x[:, :1] + 4, x[:, 1:]], 1), "another mean"),
    ],
)
def test_columns_that_are_another_are_told_once(change, says):
    found = table(change)
    assert [(f.code, f.module) for f in found] == [("input-drift", "")]
    assert says in found[0].message


@pytest.mark.parametrize(
    "change",
    [lambda x: x, lambda x: 1.4 * x, lambda x: torch.cat([x[:, :1] + 1.0, x[:, 1:]], 1), lambda x: x[:16]],
)
def test_columns_that_are_nearly_the_same_are_fine(change):
    assert table(change) == []


def test_a_small_difference_is_told_where_batches_are_all_alike():
    assert [f.evidence["record"] for f in table(lambda x: 1.7 * x, columns=200)] == ["input/rms"]


class Bare(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), *layers, nn.Linear(8, 1))

    def forward(self, x):
        return self.body(x)


def validated(model, before, phase="val"):
    with Monitor(model, watches=[InputDrift()], every=1, strict=True) as monitor:
        for _ in range(3):
            model.train()
            model(torch.randn(8, 8))
            monitor.step()
            before(model)
            with monitor.phase(phase), torch.no_grad():
                model(torch.randn(8, 8))
    return [(f.severity, f.phase) for f in monitor.findings if f.code == "validation-in-train-mode"]


@pytest.mark.parametrize(
    ("layers", "before", "phase", "told"),
    [
        ([nn.BatchNorm1d(8)], lambda m: None, "val", [("warning", "val")]),
        ([nn.BatchNorm1d(8), nn.Dropout(0.1)], lambda m: None, "valid", [("warning", "valid")]),
        ([nn.Dropout(0.1)], lambda m: None, "test", [("warning", "test")]),
        ([nn.BatchNorm1d(8)], lambda m: m.eval(), "val", []),
        ([nn.BatchNorm1d(8)], lambda m: None, "recalibration", []),
        ([nn.BatchNorm1d(8, track_running_stats=False)], lambda m: None, "val", []),
        (
            [nn.BatchNorm1d(8), nn.Dropout(0.1)],
            lambda m: (m.eval(), m.body[2].train()),
            "val",
            [],
        ),  # Monte Carlo dropout
        ([nn.LayerNorm(8), nn.Dropout(0.0)], lambda m: None, "val", []),
    ],
)
def test_a_validation_in_train_mode(layers, before, phase, told):
    assert validated(Bare(*layers), before, phase) == told
