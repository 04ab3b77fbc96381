from __future__ import annotations

import copy
import functools
import gc
import shutil
import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from stethoscope import Monitor, presets, sinks, watches
from stethoscope.probes import Activations, Gradients, Parameters

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:Profiler record function", "ignore:The .grad attribute"
)

needs_inductor = [
    pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
    pytest.mark.slow,
]
WAYS = ["wrapper", "in place", "function", "submodule", "sequential"]
STEPS = 7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.GELU())
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.layers(x)).relu()


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()  # monitors of other tests that nobody closed
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()  # other tests are not to be told that something was compiled
    assert torch._dynamo.eval_frame._stance.stance == "default"


def compile_it(model, way, backend):
    """Compile a model in one of the ways that users do; return what to call."""
    options = {"backend": backend, "fullgraph": True}
    if way in ("wrapper", "sequential"):
        return torch.compile(model, **options)
    if way == "in place":
        model.compile(**options)
        return model
    if way == "submodule":
        model.layers = torch.compile(model.layers, **options)
        return model

    @torch.compile(**options)
    def call(x):
        return model(x)

    return call


def train(way, backend, *, late=False, dropout=True, **arguments):
    """Ten steps with two batch sizes and one validation; return graphs per step, weights, random state and monitor."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Net() if way != "sequential" else Net().layers
    if not dropout:
        model.get_submodule("layers.2" if way != "sequential" else "2").p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, strict=True, **arguments) if arguments and not late else None
    call = compile_it(model, way, backend)
    if late and arguments:
        monitor = Monitor(call if isinstance(call, nn.Module) else model, optimizer, strict=True, **arguments)
    graphs = []
    for step in range(STEPS):
        x = torch.randn(4 + step % 2, 8)
        loss = call(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor:
            monitor.step(loss=loss)
        if step == 4:
            model.eval()
            if monitor:
                with monitor.phase("val"):
                    call(x)
            else:
                call(x)
            model.train()
        graphs.append(counters["stats"].get("unique_graphs", 0))
    if monitor:
        monitor.close()
    weights = torch.cat([each.detach().flatten() for each in model.parameters()])
    return graphs, weights, torch.get_rng_state(), monitor


@functools.cache
def unobserved(way):
    return train(way, "aot_eager")


@pytest.mark.parametrize(
    ("way", "late"),
    [
        ("wrapper", False),
        ("wrapper", True),
        ("submodule", False),
        *(
            pytest.param(way, late, marks=pytest.mark.slow)
            for way, late in zip(WAYS[1:], (True, False) * 2, strict=True)
        ),
    ],
)
def test_compiled_models_are_read_without_a_graph_break_and_train_to_the_same_bits(way, late):
    plain, weights, state, _ = unobserved(way)
    memory = sinks.Memory()
    graphs, seen_weights, seen_state, _ = train(
        way, "aot_eager", late=late, **presets.full(), every=3, guard="skip", sinks=[memory]
    )
    assert not counters["graph_break"]
    assert graphs[-1] == plain[-1]
    assert len(set(graphs[4:])) == 1
    assert torch.equal(weights, seen_weights)
    assert torch.equal(state, seen_state)
    read = Counter(r.step for r in memory.records if r.name == "activation/rms" and r.phase == "train")
    assert sorted(read) == [0, 3, 6]
    assert len(set(read.values())) == 1
    keys = [(r.name, r.step, r.module, r.call) for r in memory.records if r.source == "probe" and r.phase == "train"]
    assert len(keys) == len(set(keys))
    assert not [finding for finding in memory.findings if finding.severity != "info"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
def test_numbers_are_those_of_the_model_as_it_was_written(backend):
    def numbers(compiled):
        torch.manual_seed(0)
        model, memory = Net(), sinks.Memory()
        model.layers[2].p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        call = torch.compile(model, backend=backend, fullgraph=True, dynamic=True) if compiled else model
        with Monitor(call, optimizer, **presets.first_aid(), every=3, sinks=[memory], strict=True) as monitor:
            for step in range(7):
                loss = call(torch.randn(4 + step % 3, 8)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
        return {
            (r.name, r.step, r.module, r.call): r.value
            for r in memory.records
            if r.name.startswith(("activation/", "gradient/", "parameter/")) and r.step % 3 == 0
        }

    expected, seen = numbers(False), numbers(True)
    assert len(expected) > 200
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, float) and backend == "inductor":
            assert seen[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        elif isinstance(value, float):
            assert seen[key] == value, key


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_what_inductor_trains_differs_by_rounding_where_steps_are_observed_and_not_at_all_where_they_are_not():
    _, weights, state, _ = train("wrapper", "inductor", dropout=False)
    _, seen, seen_state, _ = train("wrapper", "inductor", dropout=False, **presets.first_aid(), every=3)
    assert not counters["graph_break"]
    assert torch.allclose(weights, seen, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, seen_state)
    untouched = {"probes": [Activations(phases=("val",)), Gradients(), Parameters()]}
    _, left, left_state, _ = train("wrapper", "inductor", **untouched, every=3)
    _, weights, state, _ = train("wrapper", "inductor")
    assert torch.equal(weights, left)
    assert torch.equal(state, left_state)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_dropout_under_inductor_differs_by_rounding_alone_where_its_random_numbers_are_eagers():
    with torch._inductor.config.patch(fallback_random=True):
        _, weights, state, _ = train("wrapper", "inductor")
        _, seen, seen_state, _ = train("wrapper", "inductor", **presets.first_aid(), every=3)
    assert torch.allclose(weights, seen, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, seen_state)
    _, weights, _, _ = train("wrapper", "inductor")
    _, seen, _, _ = train("wrapper", "inductor", **presets.first_aid(), every=3)
    assert not torch.allclose(weights, seen, rtol=1e-5, atol=1e-6)  # what the option is for


def test_a_phase_is_read_eagerly_where_it_is_named_and_left_compiled_where_it_is_not():
    for phases, read in ((None, False), (("train", "val"), True)):
        memory = sinks.Memory()
        train("wrapper", "aot_eager", probes=[Activations(phases=phases)], every=3, sinks=[memory])
        assert any(record.phase == "val" for record in memory.records if record.source == "probe") is read


def test_what_is_not_compiled_is_read_at_every_step_and_a_compiled_part_from_outside():
    memory = sinks.Memory()
    model = Net()
    compile_it(model, "submodule", "aot_eager")
    with Monitor(model, watches=[watches.NonFinite()], sinks=[memory], strict=True) as monitor:
        for step in range(3):
            x = torch.randn(4, 8)
            with torch.no_grad():
                if step == 2:
                    model.layers._orig_mod[0].bias[0] = torch.nan
            monitor.step(loss=model(x).sum())
    (finding,) = [each for each in memory.findings if each.severity == "error"]
    assert finding.code == "nonfinite-parameter"
    assert finding.module == "layers"
    assert finding.evidence["parameter"] == "layers.0.bias"


def test_flags_alone_do_not_make_the_training_eager_and_it_is_said():
    _, _, _, monitor = train("wrapper", "aot_eager", watches=[watches.NonFinite()])
    (finding,) = monitor.findings
    assert (finding.code, finding.evidence["probes"]) == ("probe-read-nothing", ["Activations"])
    assert "torch.compile" in finding.advice
    _, _, _, monitor = train("wrapper", "aot_eager", probes=[Activations()])
    assert [(each.code, each.severity) for each in monitor.findings] == [("observed-eagerly", "info")]


def test_bad_weights_are_noticed_in_the_compiled_steps_between():
    model, memory = Net(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Monitor(model, optimizer, **presets.first_aid(), sinks=[memory], strict=True) as monitor:
        for step in range(6):
            loss = call(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if step == 3:
                model.out.bias.grad[0] = torch.nan
            optimizer.step()
            monitor.step(loss=loss)
    findings = [finding for finding in memory.findings if finding.severity == "error"]
    assert findings[0].step == 4
    flags = [r for r in memory.records if r.name == "parameter/nonfinite"]
    assert (flags[0].step, flags[0].module) == (4, "out.bias")


def test_a_whole_compiled_train_step_with_the_monitor_inside():
    model, memory = Net(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer, **presets.first_aid(), every=3, sinks=[memory], strict=True)

    @torch.compile(backend="aot_eager")
    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss=loss)

    with monitor:
        for _ in range(5):
            step(torch.randn(4, 8))
    assert sorted({r.step for r in memory.records if r.name == "activation/rms"}) == [0, 3]
    assert sorted({r.step for r in memory.records if r.name == "gradient/norm"}) == [0, 3]


@torch._dynamo.config.patch(compiled_autograd=True)
def test_compiled_autograd_leaves_gradients_to_observed_steps():
    model, memory = Net().layers, sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    @torch.compile(backend="aot_eager")
    def backward(x):
        model(x).square().mean().backward()

    with Monitor(model, optimizer, **presets.first_aid(), every=3, sinks=[memory], strict=True) as monitor:
        for _ in range(5):
            backward(torch.randn(4, 8))
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    norms = [r.value for r in memory.records if r.name == "gradient/norm"]
    assert norms
    assert all(norms)


def test_a_guard_works_on_a_compiled_model_and_puts_its_buffers_back():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for step in range(4):
            before = copy.deepcopy(model.state_dict())
            x = torch.randn(4, 8)
            loss = call(x * torch.nan if step == 2 else x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.observe(loss=loss)
            optimizer.step()
            monitor.step()
            after = model.state_dict()
            same = [torch.equal(before[name], after[name]) for name in before]
            assert all(same) is (step == 2)
    assert [finding.code for finding in monitor.findings] == ["nonfinite-loss", "step-skipped"]
    assert not counters["graph_break"]


def test_a_stance_that_the_user_sets_stays():
    model = Net()
    monitor = Monitor(model, probes=[Activations()], every=2, strict=True)
    torch.compiler.set_stance("fail_on_recompile")
    model(torch.randn(4, 8))
    monitor.step()
    assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"
    monitor.step()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    monitor.close()
    assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"
    torch.compiler.set_stance("default")


def test_a_block_of_the_users_that_began_under_our_stance_does_not_bring_it_back():
    model = Net()
    with Monitor(model, probes=[Activations()], every=3, strict=True) as monitor:
        for _ in range(5):
            with torch.compiler.set_stance("eager_on_recompile"):
                model(torch.randn(4, 8))
                monitor.step()
            assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_monitor_that_is_dropped_leaves_nothing_eager():
    model = Net()
    monitor = Monitor(model, probes=[Activations()], strict=True)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del monitor, model
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_two_monitors_share_the_stance():
    one, two = Monitor(Net(), probes=[Activations()], every=2), Monitor(Net(), probes=[Activations()], every=1)
    for each in (one, two):
        each.model(torch.randn(4, 8))
        each.step()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    two.close()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    one.close()


def test_a_monitor_that_is_left_open_does_not_keep_others_from_running_compiled(monkeypatch):
    monkeypatch.setattr("stethoscope.probes._compiled.PATIENCE", 5)
    broken = Monitor(Net(), probes=[Activations()], every=10)  # a traceback may hold it
    model, memory = Net(), sinks.Memory()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    stances = []
    with Monitor(model, probes=[Activations()], every=3, sinks=[memory], strict=True) as monitor:
        for _ in range(12):
            call(torch.randn(4, 8))
            stances.append(torch._dynamo.eval_frame._stance.stance)
            monitor.step()
        broken.step()
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"  # of step 12
        for _ in range(9):
            broken.model(torch.randn(4, 8))
            broken.step()
    # at work again
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    broken.close()
    assert stances == ["force_eager"] * 7 + ["default"] * 2 + ["force_eager"] + ["default"] * 2
    (finding,) = [each for each in memory.findings if each.code == "monitor-left-open"]
    assert (finding.severity, finding.step) == ("warning", 7)  # the first one that ran compiled


def test_monitors_of_models_that_are_trained_in_turn_wait_for_one_another():
    one, two = Monitor(Net(), probes=[Activations()], every=1), Monitor(Net(), probes=[Activations()], every=1)
    torch.compile(one.model, backend="eager")(torch.randn(4, 8))
    with one, two:
        for step in range(60):
            one.step()
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            if step % 20 == 0:
                two.step()
    assert not [each for each in (*one.findings, *two.findings) if each.code == "monitor-left-open"]


def test_a_monitor_on_another_thread_than_the_training_is_told():
    model = Net()
    monitor = Monitor(model, **presets.first_aid(), every=1)

    def training():
        for _ in range(3):
            model(torch.randn(4, 8)).sum().backward()
            monitor.step()

    thread = threading.Thread(target=training)
    thread.start()
    thread.join()
    monitor.close()
    told = [each for each in monitor.findings if "Activations" in each.evidence.get("probes", ())]
    assert told
    assert {(each.code, each.severity) for each in told} == {("probe-read-nothing", "warning")}
    assert "on the thread that trains" in told[0].advice


def test_a_monitor_made_on_the_thread_that_trains_reads_there():
    memory = sinks.Memory()
    arguments = {**presets.first_aid(), "every": 3, "sinks": [memory]}
    thread = threading.Thread(target=train, args=("wrapper", "aot_eager"), kwargs=arguments)
    thread.start()
    thread.join()
    assert {r.step for r in memory.records if r.name == "activation/rms"} >= {0, 3, 6}


def test_another_threads_compiled_call_ends_under_the_stance_under_which_it_began():
    """With fullgraph=True, torch raises where a call has begun eagerly and finds at its end that nothing was compiled."""
    inside, ended = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            if not torch.compiler.is_compiling():
                inside.set()
                ended.wait(10)
            return y

    other, errors = torch.compile(Slow(8, 4), backend="aot_eager", fullgraph=True), []

    def serving():
        try:
            other(torch.randn(4, 8))
        except RuntimeError as error:
            errors.append(error)

    model = Net()
    with Monitor(model, probes=[Activations()], every=3, strict=True) as monitor:
        thread = threading.Thread(target=serving)
        thread.start()
        inside.wait(10)
        model(torch.randn(4, 8))
        monitor.step()
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        ended.set()
        thread.join()
        monitor.step()
        assert torch._dynamo.eval_frame._stance.stance == "default"
    assert not errors


def test_a_stance_that_could_not_be_given_back_at_the_end_is_given_back_by_the_collector(monkeypatch):
    busy = [True]
    monkeypatch.setattr("stethoscope.probes._compiled.under_way", lambda *_, **__: busy[0])
    Monitor(Net(), probes=[Activations()], strict=True).close()
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    busy.clear()
    busy.append(False)
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_monitor_may_be_made_used_and_closed_inside_of_compiled_code():
    model = Net()

    @torch.compile(backend="aot_eager")
    def whole(x):
        with Monitor(model, probes=[Activations()], every=1, strict=True) as monitor:
            for _ in range(2):
                model(x).sum().backward()
                monitor.step()
        return monitor

    monitor = whole(torch.randn(4, 8))
    (finding,) = [each for each in monitor.findings if each.severity != "info"]
    assert finding.code == "probe-read-nothing"  # a call that has begun compiled is compiled to its end
    assert "torch.compile" in finding.advice


def test_a_validation_without_the_compiler_compiles_nothing_again():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    graphs = []
    with Monitor(model, optimizer, **presets.first_aid(), every=3, strict=True) as monitor:
        for _ in range(9):
            call(torch.randn(4, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            model.eval()
            with monitor.phase("val"), torch.no_grad():
                model(torch.randn(4, 8))  # as Hugging Face's Trainer does
            model.train()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [0] + [1] * 8


def test_a_monitor_that_nobody_closes_takes_its_stance_along():
    model = Net()
    torch.compile(model, backend="eager")(torch.randn(4, 8))
    monitor = Monitor(model, probes=[Activations()], every=1)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del monitor, model
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"
