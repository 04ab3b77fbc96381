from __future__ import annotations

import copy
import gc
import json
import logging
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from stethoscope import Finding, Monitor, Record, Report, audits, presets, probes, sinks, watches
from stethoscope.testing import replay, series


def make(dropout=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.BatchNorm1d(16), nn.Linear(16, 2)
    )
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, monitor=None, micro=1):
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            out = model(torch.randn(8, 6))
            loss = out.square().mean()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        outputs.append(out.detach().clone())
        if monitor is not None:
            monitor.step(loss=loss)
    return outputs


@pytest.mark.parametrize("every", [1, 3])
def test_a_training_is_bit_identical_with_and_without(every, tmp_path):
    def run(observed):
        random.seed(1)
        np.random.seed(1)
        model, optimizer = make()
        if observed:
            sink = [sinks.Memory(), tmp_path / "run"]
            with Monitor(model, optimizer, **presets.first_aid(), every=every, sinks=sink, strict=True) as monitor:
                outputs = train(model, optimizer, 20, monitor, micro=2)
        else:
            outputs = train(model, optimizer, 20, micro=2)
        randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        return model.state_dict(), outputs, randomness

    (plain, outputs, rng), (seen, seen_outputs, seen_rng) = run(False), run(True)
    assert all(torch.equal(plain[key], seen[key]) for key in plain)
    assert all(map(torch.equal, outputs, seen_outputs))
    assert torch.equal(rng[0], seen_rng[0])
    assert rng[1] == seen_rng[1]
    assert (rng[2] == seen_rng[2]).all()


def test_steps_start_at_zero_and_every_governs_probes():
    model, optimizer = make()
    memory = sinks.Memory()
    with Monitor(
        model,
        optimizer,
        probes=[probes.Activations(("rms",)), probes.Gradients(every=2)],
        sinks=[memory],
        every=3,
        planned_steps=7,
    ) as monitor:
        train(model, optimizer, 7, monitor)
    steps = {
        name: [r.step for r in memory.records if r.name == name and r.module == ""]
        for name in ("loss", "lr", "activation/rms", "gradient/norm", "plan/steps")
    }
    assert steps == {
        "loss": [0, 1, 2, 3, 4, 5, 6],
        "lr": [0, 1, 2, 3, 4, 5, 6],
        "activation/rms": [0, 3, 6],
        "gradient/norm": [0, 2, 4, 6],
        "plan/steps": [0],
    }
    assert {r.source for r in memory.records if r.name in ("loss", "lr", "plan/steps")} == {"step"}


def test_several_optimizers_and_a_learning_rate_on_the_device():
    model = nn.Linear(2, 2)
    first = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    second = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))
    memory = sinks.Memory()
    with Monitor(model, [first, second], sinks=[memory]) as monitor:
        monitor.step()
    assert {r.name: r.value for r in memory.records} == {"lr": 0.1, "lr/1": 0.2, "lr/2": 0.5, "plan/optimizers": 2.0}


def test_numbers_tensors_and_nested_losses_are_recorded_and_larger_tensors_are_not():
    memory = sinks.Memory()
    with Monitor(nn.Linear(2, 2), sinks=[memory]) as monitor:
        monitor.observe(aux=torch.tensor([3.0]))
        monitor.step(
            {"x": torch.ones(1)},
            loss={"ctc": torch.tensor(1.0, requires_grad=True), "att": torch.tensor(2.0)},
            count=4,
            wide=torch.ones(3),
        )
    assert {r.name: r.value for r in memory.records} == {"loss/ctc": 1.0, "loss/att": 2.0, "count": 4.0}


def test_metrics_are_stamped_with_the_last_closed_step_and_nothing_is_read_early():
    memory = sinks.Memory()
    with Monitor(nn.Linear(2, 2), sinks=[memory]) as monitor:
        monitor.log({"acc": 0.5})
        monitor.step()
        monitor.step()
        monitor.log({"loss": torch.tensor(1.5), "acc": None, "inner": {"wer": 0.25}}, phase="dev")
    seen = [(r.name, r.value, r.step, r.phase, r.kind, r.source) for r in memory.records]
    assert ("acc", 0.5, 0, "val", "float", "log") in seen
    assert ("loss", 1.5, 1, "dev", "tensor", "log") in seen
    assert ("acc", None, 1, "dev", "none", "log") in seen
    assert ("inner/wer", 0.25, 1, "dev", "float", "log") in seen


def test_a_metric_dictionary_that_is_none_costs_no_training():
    with Monitor(nn.Linear(2, 2)) as monitor:
        monitor.log(3.0)
        monitor.log({1: 2.0})
    assert [finding.code for finding in monitor.findings] == ["metric-type", "metric-type"]


@dataclass(frozen=True)
class Broken:
    """A probe, watch or sink that fails at a chosen moment."""

    moment: str
    every: int | None = None
    needs: tuple = ()

    def fail(self, moment):
        if moment == self.moment:
            raise OSError(f"{moment} failed")

    def attach(self, model):
        return self

    def covers(self, other):
        return False

    def arm(self, on, phase):
        self.fail("arm")

    def read(self, given):
        self.fail("read")
        return {}

    def detach(self):
        self.fail("detach")

    def init(self):
        return {"seen": 0}

    def update(self, state, records):
        self.fail("update")
        return {"seen": state["seen"] + 1}, ()

    def open(self, run):
        self.fail("open")

    def write(self, step, records, findings):
        self.fail("write")

    def close(self):
        self.fail("close")


@pytest.mark.parametrize(
    ("role", "moment"),
    [
        ("probes", "read"),
        ("probes", "arm"),
        ("watches", "update"),
        ("sinks", "open"),
        ("sinks", "write"),
        ("sinks", "close"),
    ],
)
def test_a_part_that_fails_is_switched_off_and_said_while_all_else_goes_on(role, moment, caplog):
    model, optimizer = make()
    memory = sinks.Memory()
    parts = {"probes": [probes.Activations(("rms",))], "watches": [watches.NonFinite()], "sinks": [memory]}
    parts[role] = [Broken(moment), *parts[role]]
    with Monitor(model, optimizer, every=1, **parts) as monitor:
        train(model, optimizer, 4, monitor)
    if moment == "close":
        assert "Closing Broken failed" in caplog.text
        assert not monitor.findings
    else:
        (finding,) = [f for f in monitor.findings if f.code == "part-disabled"]
        assert f"Broken failed with OSError: {moment} failed" in finding.message
        assert "Traceback" in finding.evidence["traceback"]
        assert finding in memory.findings
    assert [r.step for r in memory.records if r.name == "activation/rms" and r.module == ""] == [0, 1, 2, 3]
    if role == "sinks" and moment != "close":
        assert "records and findings were not written" in caplog.text


@pytest.mark.parametrize(("role", "moment"), [("probes", "read"), ("watches", "update"), ("sinks", "write")])
def test_strict_raises_where_it_happens(role, moment):
    monitor = Monitor(nn.Linear(2, 2), **{role: [Broken(moment)]}, strict=True)
    with pytest.raises(OSError, match=moment):
        monitor.step(loss=1.0)


def test_an_exception_in_on_finding_stops_the_training_after_everything_is_written(tmp_path):
    class StopTraining(Exception):
        pass

    def stop(finding):
        raise StopTraining(finding.code)

    model, memory = nn.Linear(2, 2), sinks.Memory()
    monitor = Monitor(model, watches=[watches.NonFinite()], sinks=[memory], on_finding=stop)
    with pytest.raises(StopTraining, match="nonfinite-activation"):
        monitor.step(loss=model(torch.full((2, 2), torch.nan)).sum())
    assert memory.findings
    assert monitor.findings
    monitor.step(loss=model(torch.ones(2, 2)).sum())
    monitor.close()
    assert {r.step for r in memory.records} == {0, 1}


def test_normalisations_tell_whether_a_model_was_trained_before():
    def told(spoil):
        model, memory = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)), sinks.Memory()
        spoil(model)
        with Monitor(model, sinks=[memory]) as monitor:
            monitor.step()
            monitor.step()
        return [(r.step, r.value) for r in memory.records if r.name == "plan/pretrained"]

    def trained(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(8, 2)).square().sum().backward()
        optimizer.step()

    assert told(trained) == [(0, 1.0)]
    assert told(lambda model: None) == [(0, 0.0)]
    assert told(lambda model: nn.init.zeros_(model[1].weight)) == [(0, 0.0)]
    assert told(lambda model: nn.init.normal_(model[2].weight, 1.0, 0.02)) == [(0, 0.0)]  # as in DCGAN
    assert told(lambda model: model.__delitem__(slice(1, 3))) == []


def test_reports_and_findings_of_audits_travel_with_the_others(caplog):
    memory = sinks.Memory()
    finding = Finding("batch-leak", "warning", "Items mix.", "Call eval().")
    with caplog.at_level(logging.WARNING, "stethoscope"), Monitor(nn.Linear(2, 2), sinks=[memory]) as monitor:
        monitor.add(Report(title="audit", findings=(finding,)))
        monitor.add(Finding("note", "info", "Fine.", ""))
    assert [f.code for f in memory.findings] == ["batch-leak", "note"]
    assert "batch-leak" in caplog.text
    assert "note" not in caplog.text


def test_a_watch_whose_records_never_come_is_starved_and_one_of_a_preset_is_only_info():
    @dataclass(frozen=True)
    class Wants:
        needs: tuple = ()

        def init(self):
            return {"best": None}

        def update(self, state, records):
            return {"best": 1} if any(r.name == "wanted" for r in records) else state, ()

    with Monitor(nn.Linear(2, 2), watches=[Wants()]) as monitor:
        monitor.step(loss=1.0)
    assert [(f.code, f.severity) for f in monitor.findings] == [("watch-starved", "warning")]
    with Monitor(nn.Linear(2, 2), watches=[Wants()]) as monitor:
        monitor.step(wanted=1.0)
    assert not monitor.findings


def test_idle_parts_of_a_preset_are_told_together_and_do_not_warn():
    model = nn.Linear(2, 2)
    with Monitor(model, **presets.full(), every=1) as monitor:
        model(torch.ones(2, 2))
        monitor.step()
    told = {f.code: f for f in monitor.findings}
    assert len(told) == len(monitor.findings)
    assert {"Separation", "Classes"} < set(told["probe-read-nothing"].evidence["probes"])
    assert {"Plateau", "LossInput"} < set(told["watch-starved"].evidence["watches"])


def test_what_nobody_asked_for_and_what_somebody_did_are_told_apart():
    with Monitor(nn.Linear(2, 2), probes=[*presets.full()["probes"], probes.Classes(every=1)], every=1) as monitor:
        monitor.step()
    told = [f for f in monitor.findings if f.code == "probe-read-nothing"]
    assert {f.severity: f.evidence["probes"] == ["Classes"] for f in told} == {"info": False, "warning": True}


def test_idle_parts_of_a_preset_do_not_warn():
    with Monitor(nn.Linear(2, 2), **presets.first_aid()) as monitor:
        monitor.step()
    assert {f.code for f in monitor.findings} == {"probe-read-nothing", "watch-starved"}
    assert {f.severity for f in monitor.findings} == {"info"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": [probes.Activations]}, r"Activations\(\) with parentheses"),
        ({"watches": [3]}, "object of int"),
        ({"optimizer": 3}, "torch.optim.Optimizer"),
        ({"every": 0}, "at least 1"),
        ({"planned_steps": 0}, "at least 1"),
        ({"sinks": [3]}, "Cannot write to"),
        ({"guard": "raise"}, "needs the optimizer"),
        ({"guard": "stop"}, "'raise' or 'skip'"),
        ({"replay": print}, "needs a guard"),
    ],
)
def test_mistakes_in_the_set_up_are_told_at_once_and_leave_no_hook(arguments, message):
    model = nn.Linear(2, 2)
    with pytest.raises((TypeError, ValueError), match=message):
        Monitor(model, **arguments)
    assert not model._forward_hooks


def test_not_a_module():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got the class"):
        Monitor(nn.Linear)


def test_close_twice_and_step_after_close():
    monitor = Monitor(nn.Linear(2, 2), **presets.first_aid())
    monitor.close()
    monitor.close()
    with pytest.raises(RuntimeError, match="closed"):
        monitor.step()


def test_passes_of_audits_are_not_read_and_their_findings_are_delivered():
    seen = {}
    for audited in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4))
        x, memory = torch.randn(2, 4, 50), sinks.Memory()
        with Monitor(model, **presets.full(), sinks=memory, every=1) as monitor:
            if audited:
                monitor.add(audits.causality(model, x))
            loss = model(x).square().mean()
            loss.backward()
            monitor.step(loss=loss)
        seen[audited] = [(r.name, r.module, r.step, r.value) for r in memory.records]
        assert [f.code for f in memory.findings].count("causality-leak") == 2 * audited
    assert any(name.startswith("input/") for name, *_ in seen[True])
    assert seen[True] == seen[False]


def test_two_monitors_on_one_model_and_a_model_without_modules_or_parameters():
    class Bare(nn.Module):
        def forward(self, x):
            return x * 2

    model, memories = Bare(), [sinks.Memory(), sinks.Memory()]
    monitors = [Monitor(model, **presets.first_aid(), sinks=[memory], every=1) for memory in memories]
    for _ in range(2):
        loss = model(torch.ones(3, 2)).sum()
        for monitor in monitors:
            monitor.step(loss=loss)
    monitors[0].close()
    model(torch.ones(3, 2))
    monitors[1].step()
    monitors[1].close()
    assert [len({r.step for r in memory.records}) for memory in memories] == [2, 3]
    assert not model._forward_hooks


def test_an_unwritable_path_costs_records_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    model, optimizer = make()
    with Monitor(model, optimizer, sinks=[file / "run"]) as monitor:
        train(model, optimizer, 3, monitor)
    assert [f.code for f in monitor.findings] == ["part-disabled"]


def test_what_is_given_does_not_stay_alive_after_the_step():
    import weakref

    model = nn.Linear(4, 4)
    with Monitor(model, **presets.first_aid(), every=1, strict=True) as monitor:
        x = torch.ones(3, 4)
        out = model(x)
        alive = [weakref.ref(x), weakref.ref(out)]
        monitor.step(x, loss=out.sum(), estimates=out)
        del x, out
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


def test_nothing_piles_up_over_two_thousand_steps():
    model, optimizer = make()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    with Monitor(model, optimizer, **presets.first_aid(), every=10) as monitor:
        train(model, optimizer, 1300, monitor)  # the loss is flat by then: what a first finding loads is loaded
        before = objects()
        train(model, optimizer, 2000, monitor)
        assert (
            objects() - before < 400
        )  # windows fill and empty, of monitors that other tests forgot as well; one a step would be 2000


def test_a_resumed_run_goes_on_where_it_was():
    model, optimizer = make()
    memory = sinks.Memory()
    with Monitor(model, optimizer, watches=[watches.NonFinite()], sinks=[memory]) as monitor:
        train(model, optimizer, 3, monitor)
        state = json.loads(json.dumps(monitor.state_dict()))
    runs = []

    class Keeps(sinks.Memory):
        def open(self, run):
            super().open(run)
            runs.append(run)

    again = Keeps()
    with Monitor(model, optimizer, watches=[watches.NonFinite()], sinks=[again]) as monitor:
        monitor.load_state_dict(state)
        train(model, optimizer, 2, monitor)
        assert not monitor.findings
    assert sorted({r.step for r in memory.records + again.records}) == [0, 1, 2, 3, 4]
    assert [(run.resumed_from, run.id) for run in runs] == [(2, state["run"])]


def test_going_back_is_said_and_a_foreign_state_is_refused():
    model, optimizer = make()
    with Monitor(model, optimizer) as monitor:
        state = copy.deepcopy(monitor.state_dict())
        train(model, optimizer, 3, monitor)
        monitor.load_state_dict(state)
        train(model, optimizer, 1, monitor)
        with pytest.raises(ValueError, match="Not a state"):
            monitor.load_state_dict({"epoch": 3})
    assert [f.code for f in monitor.findings] == ["step-backwards"]


def test_wrappers_are_looked_through():
    class DistributedDataParallel(nn.Module):  # by name: the real one needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2)))
    memory = sinks.Memory()
    with Monitor(wrapped, probes=[probes.Activations(("rms",))], sinks=[memory]) as monitor:
        wrapped(torch.ones(3, 2))
        monitor.step()
    assert {r.module for r in memory.records} == {"", "0"}


def test_an_exception_in_the_loop_removes_all_hooks():
    model, _ = make()

    def loop(monitor):
        model(torch.ones(4, 6)).sum().backward()
        raise KeyError("th_accuracy")

    with pytest.raises(KeyError), Monitor(model, **presets.first_aid()) as monitor:
        loop(monitor)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert monitor.findings == []


def test_cpu_tensors_are_copied_before_they_change():
    seen = []

    @dataclass(frozen=True)
    class Alias:
        value: torch.Tensor = field(default_factory=lambda: torch.ones(()))
        every: int | None = 1

        def attach(self, model):
            return self

        def covers(self, other):
            return False

        def arm(self, on, phase): ...
        def detach(self): ...

        def read(self, given):
            from stethoscope._protocols import Key

            return {Key("probe/value"): self.value}

    probe, memory = Alias(), sinks.Memory()
    with Monitor(nn.Linear(2, 2), probes=[probe], sinks=[memory]) as monitor:
        monitor.step()
        probe.value.fill_(7.0)
        seen = [r.value for r in memory.records]
    assert seen == [1.0]


@pytest.mark.parametrize("reading", [torch.ones((), device="meta"), "not a tensor", torch.ones(3)])
def test_readings_that_make_no_records_cost_themselves_alone(reading):
    @dataclass(frozen=True)
    class Odd:
        every: int | None = 1

        def attach(self, model):
            return self

        def covers(self, other):
            return False

        def arm(self, on, phase): ...
        def detach(self): ...

        def read(self, given):
            from stethoscope._protocols import Key

            return {Key("probe/value"): reading}

    memory = sinks.Memory()
    with Monitor(nn.Linear(2, 2), probes=[Odd()], sinks=[memory]) as monitor:
        for _ in range(3):
            monitor.step(loss=torch.tensor(1.0))
    assert [f.code for f in monitor.findings] == ["part-disabled"]
    assert [(r.name, r.step) for r in memory.records] == [("loss", 0), ("loss", 1), ("loss", 2)]


def test_series_and_replay_bring_together_what_belongs_together():
    @dataclass(frozen=True)
    class Sizes:
        needs: tuple = ()

        def init(self):
            return []

        def update(self, state, records):
            return [*state, len(records)], [Finding("size", "info", str(len(records)), "")]

    records = [*series(loss=[1.0, 2.0], lr=[0.1, 0.1]), Record("acc", 1.0, 1, phase="val", source="log")]
    assert [f.message for f in replay(Sizes(), records)] == ["2", "2", "1"]
    with pytest.raises(ValueError, match="as long as the steps"):
        series(a=[1.0], b=[1.0, 2.0])


@pytest.fixture
def restored():
    """Process-wide settings of torch as they were."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
        lambda: torch.use_deterministic_algorithms(mode=True),
    ],
)
@pytest.mark.usefixtures("restored")
def test_process_wide_settings_of_torch_do_not_matter(setting):
    model, optimizer = make()
    batches = [torch.randn(8, 6) for _ in range(4)]
    memory = sinks.Memory()
    setting()
    with Monitor(model, optimizer, **presets.first_aid(), every=2, sinks=[memory], strict=True) as monitor:
        for x in batches:
            for _ in range(2):
                model(x).square().mean().backward()
            optimizer.step()
            monitor.step(loss=np.float32(1.0))
    assert not memory.findings
    assert {r.step for r in memory.records if r.name == "activation/rms"} == {0, 2}
    assert [r.value for r in memory.records if r.name == "loss"] == [1.0] * 4


def test_a_monitor_that_was_never_given_a_step_says_so():
    model = nn.Linear(2, 1)
    with Monitor(model, watches=[watches.NonFinite()]) as monitor:
        model(torch.ones(3, 2)).sum().backward()
    (finding,) = monitor.findings
    assert finding.severity == "warning"
    assert "monitor.step(loss=loss)" in finding.advice
    with pytest.raises(KeyError), Monitor(model) as monitor:
        raise KeyError
    assert monitor.findings == []


@pytest.mark.parametrize(
    "call",
    [
        lambda monitor: monitor.step(loss=1.0),
        lambda monitor: monitor.log({"a": 1.0}),
        lambda monitor: monitor.phase("val").__enter__(),
        lambda monitor: monitor.add(Finding("output-silent", "error", "Silent.", "Listen.")),
    ],
)
def test_what_is_given_to_a_closed_monitor_is_refused_and_not_lost_in_silence(call):
    monitor = Monitor(nn.Linear(2, 1))
    monitor.close()
    monitor.close()
    with pytest.raises(RuntimeError, match="Create a new one"):
        call(monitor)


@pytest.mark.parametrize("state", [None, {}, {"version": 1, "step": 3}, {"version": 2, "step": 3}])
def test_a_state_that_is_none_is_refused_and_changes_nothing(state):
    monitor = Monitor(nn.Linear(2, 1))
    before = monitor.state_dict()
    with pytest.raises(ValueError, match="Not a state"):
        monitor.load_state_dict(state)
    assert monitor.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": probes.Activations()}, r"list such as \[Activations\(\)\]"),
        ({"watches": watches.NonFinite()}, r"list such as \[NonFinite\(\)\]"),
        ({"every": 2.5}, "an int"),
        ({"every": "5"}, "an int"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_with_what_to_write(arguments, message):
    with pytest.raises(TypeError, match=message):
        Monitor(nn.Linear(2, 1), **arguments)
