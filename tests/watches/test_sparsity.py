import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from stethoscope import Monitor, audits, sinks
from stethoscope._record import Record
from stethoscope.audits import Schedule
from stethoscope.probes import Density
from stethoscope.testing import replay, series
from stethoscope.watches import Sparsity


class BlockSparsifier:
    """Does what RNNoise's does: counts its calls, keeps the strongest blocks of each gate, the diagonal if asked."""

    def __init__(self, gru, densities, start, stop, interval, block=(8, 4)):
        self.gru, self.densities, self.block = gru, densities, block
        self.start, self.stop, self.interval = start, stop, interval
        self.count = 0

    def step(self):
        self.count += 1
        if self.count < self.start or (self.count < self.stop and self.count % self.interval):
            return
        dense = max(0.0, (self.stop - self.count) / (self.stop - self.start)) ** 3
        with torch.no_grad():
            for weight, densities in self.densities(self.gru):
                for gate, (density, diagonal) in zip(weight.chunk(3), densities, strict=True):
                    keep = strongest(gate, self.block, dense + (1 - dense) * density)
                    gate.mul_(torch.maximum(keep, torch.eye(*gate.shape)) if diagonal else keep)


def strongest(weight, block, density):
    tiles = weight.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    power = tiles.square().sum((1, 3))
    number = round(density * power.numel())
    keep = torch.zeros(power.numel())
    keep[power.flatten().topk(number).indices] = 1
    return keep.view_as(power).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def rnnoise(gru):
    yield gru.weight_ih_l0, ((0.3, False), (0.2, False), (0.5, False))
    yield gru.weight_hh_l0, ((0.3, True), (0.2, True), (0.5, True))


def train(gru, sparsifier, steps, watch, state=None, planned=None, first=0):
    """A loop as a user writes it, with the probe and the watch in the monitor's place."""
    optimizer = torch.optim.AdamW(gru.parameters(), lr=1e-3)
    attachment = Density(block=(8, 4)).attach(gru)
    state = watch.init() if state is None else state
    found, curve = [], []
    if planned:
        state, findings = watch.update(state, [Record("plan/steps", float(planned), first, source="step")])
        found += findings
    for step in range(first, first + steps):
        attachment.arm(True, "train")
        optimizer.zero_grad()
        gru(torch.randn(3, 2, gru.input_size))[0].square().mean().backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        records = [Record(k.name, float(v), step, module=k.module) for k, v in attachment.read({}).items()]
        curve += [r.value for r in records if (r.name, r.module) == ("density/elements", "weight_ih_l0")]
        state, findings = watch.update(json.loads(json.dumps(state)), records)
        found += findings
    return state, found, curve


def codes(findings):
    return [finding.code for finding in findings]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_size_384_ends_at_147456_of_442368():
    gru = nn.GRU(384, 384)
    sparsifier = BlockSparsifier(gru, rnnoise, 2, 4, 1)
    watch = Sparsity(Schedule("sparsify", 2, 4), target={"weight_ih_l0": 1 / 3})
    _, found, curve = train(gru, sparsifier, 4, watch, planned=4)
    assert found == []
    counts = [round(density * 442368) for density in curve]
    assert counts[:2] == [442368, 442368]
    assert counts[1] > counts[2] > counts[3] == 147456
    report = audits.sparsity(gru, weights=("weight_ih*",), target=1 / 3)
    assert (report.weights, report.nonzero) == (442368, 147456)
    assert report.matrices[0].block == (8, 4)
    hidden = audits.sparsity(gru, weights=("weight_hh*",)).matrices[0]
    assert hidden.block == (8, 4)  # although the diagonal stays


def test_never_started_is_said_at_the_first_step_and_measured_at_the_end():
    gru = nn.GRU(384, 384)
    watch = Sparsity(Schedule("sparsify", 2500, 8000, 50))
    _, found, _ = train(gru, BlockSparsifier(gru, rnnoise, 2500, 8000, 50), 2, watch, planned=1200)
    assert codes(found) == ["schedule-unreachable"]
    assert found[0].step == 0
    report = audits.sparsity(gru, weights=("weight_ih*",), target=1 / 3)
    assert report.nonzero == 442368
    assert report.times_larger == 3.0


def test_the_saw_tooth_between_interval_steps_is_healthy():
    gru = nn.GRU(32, 32)
    watch = Sparsity(Schedule("sparsify", 20, 80, 10), target={"weight_ih*": 1 / 3, "weight_hh*": 0.4})
    _, found, curve = train(gru, BlockSparsifier(gru, rnnoise, 20, 80, 10), 120, watch, planned=120)
    assert found == []
    assert curve[69] < 0.5  # count 70, an interval step
    assert curve[70] == 1.0  # refilled by AdamW within one step
    assert max(curve[79:]) == pytest.approx(1 / 3, abs=0.01)


def test_the_saw_tooth_is_learned_without_a_schedule():
    gru = nn.GRU(32, 32)
    _, found, _ = train(gru, BlockSparsifier(gru, rnnoise, 20, 80, 10), 120, Sparsity())
    assert found == []


def test_a_sparsifier_that_is_not_called_is_missed():
    gru = nn.GRU(32, 32)
    _, found, _ = train(gru, None, 60, Sparsity(Schedule("sparsify", 10, 50, 5)), planned=60)
    assert codes(found) == ["sparsity-missed"]
    assert 10 < found[0].step < 30


def test_a_target_that_is_not_met_is_named():
    gru = nn.GRU(32, 32)
    watch = Sparsity(Schedule("sparsify", 5, 20, 5), target={"weight_ih*": 0.1})
    _, found, _ = train(gru, BlockSparsifier(gru, rnnoise, 5, 20, 5), 25, watch, planned=25)
    assert codes(found) == ["sparsity-missed"]
    assert found[0].module == "weight_ih_l0"
    assert "3.3 times" in found[0].message


@pytest.mark.parametrize("keep_state", [True, False])
def test_a_resumed_run_whose_counter_begins_anew_becomes_dense(keep_state):
    gru = nn.GRU(32, 32)
    watch = Sparsity(Schedule("sparsify", 10, 30, 5))
    state, found, curve = train(gru, BlockSparsifier(gru, rnnoise, 10, 30, 5), 40, watch, planned=40)
    assert found == []
    assert curve[-1] < 0.4
    resumed = Sparsity(Schedule("sparsify", 100, 300, 5))
    _, found, curve = train(
        gru,
        BlockSparsifier(gru, rnnoise, 100, 300, 5),
        40,
        resumed,
        state=state if keep_state else None,
        first=40 if keep_state else 0,
    )
    assert curve[0] > 0.99
    assert codes(found) == ["sparsity-lost"]  # one for all matrices
    assert set(found[0].evidence["matrices"]) == {"weight_ih_l0", "weight_hh_l0"}
    assert "2.9 times" in found[0].message or "3.0 times" in found[0].message
    assert found[0].step == (40 if keep_state else 0) + 11  # more than two intervals


def test_a_sparse_model_that_is_trained_on_without_a_sparsifier_loses_it():
    gru = nn.GRU(32, 32)
    sparsifier = BlockSparsifier(gru, rnnoise, 0, 1, 1)
    sparsifier.step()
    _, found, _ = train(gru, None, 210, Sparsity())
    assert codes(found) == ["sparsity-lost"]
    assert found[0].step == 201


def test_a_dense_training_without_schedule_says_nothing():
    _, found, _ = train(nn.GRU(32, 32), None, 30, Sparsity())
    assert found == []


def test_zero_initialised_matrices_that_fill_up_are_healthy():
    gru = nn.GRU(32, 32)
    nn.init.zeros_(gru.weight_ih_l0[:50])
    _, found, curve = train(gru, None, 300, Sparsity())
    assert curve[0] > 0.9
    assert found == []
    gru = nn.GRU(32, 32)  # of every kind that initialisations make
    nn.init.zeros_(gru.weight_ih_l0)
    nn.init.zeros_(gru.weight_hh_l0[:, :20])
    assert train(gru, None, 220, Sparsity())[1] == []
    gru = nn.GRU(32, 32)
    gru.weight_hh_l0.data = torch.eye(32).repeat(3, 1)
    assert train(gru, None, 220, Sparsity())[1] == []
    values = [0.3] * 50 + [1.0] * 500  # frozen at first, then unfrozen
    records = [Record("density/elements", value, step, module="w") for step, value in enumerate(values)]
    assert replay(Sparsity(), records) == []


def test_torch_pruning_never_gets_lost():
    class Once:
        def __init__(self):
            self.count = 0

        def step(self):
            self.count += 1
            if self.count in (10, 20):
                prune.l1_unstructured(model.head, "weight", amount=0.5)

    model = nn.GRU(32, 32)
    model.head = nn.Linear(8, 8)
    _, found, _ = train(model, Once(), 300, Sparsity())
    assert found == []


def test_bad_targets_say_what_is_legal():
    with pytest.raises(ValueError, match="0 to 1"):
        Sparsity(target=1.5)
    with pytest.raises(ValueError, match="0 to 1"):
        Sparsity(target={"a": -0.1})


def test_plans_that_are_reached_say_nothing():
    watch = Sparsity(Schedule("sparsify", 2500, 8000, 50))
    assert replay(watch, series(steps=[0], **{"plan/steps": [17550.0]})) == []
    assert codes(replay(watch, series(steps=[0], **{"plan/steps": [5000.0]}))) == ["schedule-unfinished"]
    assert replay(Sparsity(), series(steps=[0], **{"plan/steps": [5000.0]})) == []


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1), st.just(float("nan")), st.just(float("inf"))), max_size=60),
    st.integers(0, 59),
)
def test_any_history_in_any_cut_gives_the_same_findings(values, cut):
    watch = Sparsity(Schedule("any", 5, 30, 5), target=0.5)
    records = [Record("density/elements", value, step, module="w") for step, value in enumerate(values)]
    whole = replay(watch, records)
    state, found = watch.init(), []
    for index, record in enumerate(records):
        if index == cut:
            state = json.loads(json.dumps(state))
        state, findings = watch.update(state, [record])
        found += findings
    assert found == whole
    assert all(0 <= finding.step < len(values) for finding in whole)


def test_the_whole_way_through_a_monitor():
    gru = nn.GRU(32, 32)
    sparsifier = BlockSparsifier(gru, rnnoise, 20, 80, 10)
    optimizer = torch.optim.AdamW(gru.parameters(), lr=1e-3)
    watch = Sparsity(Schedule("sparsify", 20, 80, 10), target={"weight_ih*": 1 / 3}, block=(8, 4), metric="val_loss")
    memory = sinks.Memory()
    with Monitor(gru, optimizer, watches=[watch], sinks=[memory], planned_steps=90, strict=True) as monitor:
        for step in range(90):
            optimizer.zero_grad()
            loss = gru(torch.randn(3, 2, 32))[0].square().mean()
            loss.backward()
            optimizer.step()
            sparsifier.step()
            monitor.step(loss=loss)
            if step % 5 == 4:
                monitor.log({"val_loss": 1.0 + step / 100})
    (finding,) = monitor.findings  # what it cost, and nothing else
    assert (finding.code, finding.severity, finding.step) == ("sparsity-cost", "info", 79)
    assert "was 1.24 at step 24" in finding.message  # the action at count 20 keeps everything yet
    assert "is 1.79 at step 79" in finding.message
    curve = [r.value for r in memory.records if r.name == "density/blocks" and r.module == "weight_ih_l0"]
    assert len(curve) == 90  # every step, although every=50
    assert curve[-1] == pytest.approx(1 / 3, abs=0.01)
    with Monitor(gru, optimizer, watches=[watch], planned_steps=15, strict=True) as monitor:
        monitor.step()
    assert codes(monitor.findings) == ["schedule-unreachable"]


def test_a_target_for_a_matrix_that_does_not_exist_is_told_once():
    records = [Record("density/elements", 1.0, step, module="0.weight", source="probe") for step in range(3)]
    watch = Sparsity(target={"0.weight": 0.5, "gru*": 0.3})
    (finding,) = replay(watch, records)
    assert (finding.code, finding.step, finding.evidence) == ("watch-starved", 0, {"patterns": ["gru*"]})
    assert "0.weight" in finding.advice
