"""What `stethoscope run` does inside of a process: here, in the one of the tests."""

import gc
import logging
import sys
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from stethoscope import FindingsError, Monitor, sinks
from stethoscope.integrations._script._script import Script
from stethoscope.integrations._script._session import folder
from stethoscope.integrations._script._settings import Settings
from stethoscope.integrations._script._traceback import hide


@pytest.fixture
def listening(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gc.collect()  # models of earlier tests

    @contextmanager
    def begun(**options):
        script = Script(Settings(target="train.py", to="run", **options))
        script.begin()
        try:
            yield script
        finally:
            script.end()

    return begun


def net(inputs=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 1))


def train(model, steps=10, optimizer=None, validate=()):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        x = torch.randn(4, 8)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in validate:
            model.eval()
            with torch.no_grad():
                model(torch.randn(6, 8))
                model(torch.randn(6, 8))
            model.train()
    return losses


def records(path="run"):
    return [record for delivery in sinks.read(path) for record in delivery.records]


def values(name, path="run"):
    return [record.value for record in records(path) if record.name == name]


def hooks(model):
    return sum(
        len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._forward_pre_hooks_with_kwargs)
        for each in model.modules()
    )


def test_a_loop_that_knows_nothing_of_it_is_recorded_step_by_step(listening):
    with listening(every=5):
        losses = train(net(), 12)
    assert values("loss") == pytest.approx(losses)
    assert values("lr") == pytest.approx([0.01] * 12)
    rms = [(r.step, r.module) for r in records() if r.name == "activation/rms"]
    assert rms == [(step, module) for step in (0, 5, 10) for module in ("0", "1", "2", "")]


def test_the_training_is_the_same_to_the_last_bit_and_nothing_of_ours_is_left(listening):
    def one():
        model = net()
        model.insert(1, nn.Dropout(0.3))
        losses = train(model, 20, validate=(3, 9))
        return losses, [each.tolist() for each in model.parameters()], torch.rand(3).tolist(), hooks(model)

    plain = one()
    before = (
        torch.autograd.backward,
        torch.amp.GradScaler.scale,
        sys.excepthook,
        logging.getLogger("stethoscope").handlers[:],
    )
    with listening(every=4):
        observed = one()
    assert observed == plain
    assert observed[-1] == 0
    after = (
        torch.autograd.backward,
        torch.amp.GradScaler.scale,
        sys.excepthook,
        logging.getLogger("stethoscope").handlers,
    )
    assert after == before
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not _global_optimizer_post_hooks


def test_calls_in_eval_mode_without_gradients_are_the_phase_val_at_most_once_in_every_steps(listening):
    with listening(every=5):
        train(net(), 20, validate=range(20))
    val = [(r.step, r.module) for r in records() if r.phase == "val" and r.name == "activation/rms"]
    assert val == [(step, module) for step in (0, 5, 10, 15) for module in ("0", "1", "2", "")]
    training = [r.step for r in records() if r.phase == "train" and r.name == "activation/rms" and r.module == ""]
    assert training == [0, 5, 10, 15]


def test_a_generator_and_its_critic_are_two_runs_with_the_sum_of_what_each_is_trained_on(listening):
    class Generator(nn.Sequential):
        pass

    generator, critic = Generator(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), net()
    first, second = torch.optim.Adam(critic.parameters()), torch.optim.Adam(generator.parameters(), lr=0.5)
    expected = {"critic": [], "generator": []}
    with listening():
        for _ in range(6):
            real = critic(torch.randn(4, 8)).square().mean()
            critic.zero_grad()
            real.backward()
            fake = generator(torch.randn(4, 4))
            made = critic(fake.detach()).mean()
            made.backward()
            first.step()
            fooled = -critic(fake).mean()
            generator.zero_grad()
            fooled.backward()
            second.step()
            expected["critic"].append((real + made).item())
            expected["generator"].append(fooled.item())
    assert values("loss") == pytest.approx(expected["critic"])
    assert values("loss", "run/Generator") == pytest.approx(expected["generator"])
    assert set(values("lr", "run/Generator")) == {0.5}


def test_two_optimizers_of_one_model_make_one_step(listening):
    model = net()
    parts = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.2)]
    with listening():
        for _ in range(5):
            model.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            for each in parts:
                each.step()
    assert len(values("loss")) == 5
    assert set(values("lr/1")) == {0.2}


def test_an_optimizer_that_never_steps_holds_nothing_up_for_long(listening):
    model = net()
    unused = torch.optim.Adam(model[2].parameters())
    with listening():
        train(model, 10)
    assert len(values("loss")) == 9
    del unused


def test_the_search_for_a_model_that_is_never_called_ends(listening):
    forgotten = torch.optim.SGD(net().parameters(), lr=0.1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with listening(preset="none"):
        train(model, 300, optimizer)
        assert not torch.nn.modules.module._global_forward_pre_hooks
        later = net()
        train(later, 3)
    assert len(values("loss")) == 300
    assert len(values("loss", "run/Sequential")) >= 2
    del forgotten


def test_accumulated_losses_are_summed_and_a_grad_scaler_is_seen_through(listening):
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=256.0)
    expected = []
    with listening():
        for _ in range(4):
            optimizer.zero_grad()
            losses = [model(torch.randn(4, 8)).square().mean() / 2 for _ in range(2)]
            for loss in losses:
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            expected.append(sum(losses).item())
    assert values("loss") == pytest.approx(expected)


def test_a_step_that_the_scaler_leaves_out_takes_its_loss_with_it(listening):
    model = net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=256.0)
    expected = []
    with listening():
        for step in range(6):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8)).square().mean()
            scaler.scale(loss).backward()
            if step in (1, 2):
                model[0].weight.grad[0, 0] = float("inf")  # what an overflow does
            else:
                expected.append(loss.item())
            scaler.step(optimizer)
            scaler.update()
    assert values("loss") == pytest.approx(expected)


def test_an_optimizer_that_wraps_another_one_makes_one_step(listening):
    class Wrapping(torch.optim.Optimizer):  # as SAM and Lookahead do
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base, self.param_groups = base, base.param_groups

        def step(self, closure=None):
            self.base.step()

    model = net()
    with listening():
        losses = train(model, 5, Wrapping(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert values("loss") == pytest.approx(losses)
    assert values("lr") == pytest.approx([0.1] * 5)


def test_of_a_line_search_the_loss_at_its_start_counts(listening):
    model, x = net(), torch.randn(16, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    with listening():
        expected = [optimizer.step(closure).item() for _ in range(3)]
    assert values("loss") == pytest.approx(expected)


def test_gradients_of_inputs_are_no_loss(listening):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with listening():
        for _ in range(3):
            x = torch.randn(4, 8, requires_grad=True)
            (1000 * model(x).mean()).backward(inputs=[x])
            loss = model(x.detach() + x.grad.sign()).square().mean() * 0 + 1
            loss.backward()
            optimizer.step()
    assert values("loss") == [1.0] * 3


def test_layers_that_are_called_one_by_one_are_found_in_what_holds_them(listening):
    class Holder(nn.Module):  # as a LightningModule's training_step does
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(4, 1)

        def training_step(self, x):
            return self.decoder(self.encoder(x)).square().mean()

    model = Holder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with listening() as script:
        for _ in range(3):
            optimizer.zero_grad()
            model.training_step(torch.randn(4, 8)).backward()
            optimizer.step()
        assert [each.name for each in script.sessions] == ["Holder"]
    assert [r.module for r in records() if r.name == "activation/rms"] == ["encoder", "decoder"]


def test_modules_that_share_an_optimizer_and_nothing_else_are_put_together(listening):
    encoder, decoder = nn.Linear(8, 4), nn.GRU(4, 2)
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    with listening(every=2):
        for step in range(4):
            optimizer.zero_grad()
            decoder(encoder(torch.randn(5, 8)))[0].square().mean().backward()
            optimizer.step()
            if step == 2:
                encoder.eval()
                with torch.no_grad():
                    encoder(torch.randn(5, 8))
                encoder.train()
    train = [(r.step, r.module) for r in records() if r.name == "activation/rms" and r.phase == "train"]
    assert train == [(step, module) for step in (0, 2) for module in ("Linear", "GRU")]
    assert {r.module for r in records() if r.phase == "val"} == {"Linear"}
    assert len(values("loss")) == 4


def test_a_model_that_the_script_monitors_itself_is_left_to_it(listening, capsys):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with listening() as script:
        script.settings = Settings(target="train.py", to="run", pid=__import__("os").getpid())
        with Monitor(model, optimizer, sinks=["own"]):
            train(model, 3, optimizer)
        assert script.sessions == []
    assert "monitors its model itself" in capsys.readouterr().err


def test_models_trained_one_after_the_other_are_let_go_and_recorded_from_their_first_step(listening):
    gone = []
    with listening():
        for _ in range(3):
            model = net()
            gone.append(weakref.ref(model))
            train(model, 4)
            del model
            gc.collect()
            assert gone[-1]() is None
    assert [len(values("loss", path)) for path in ("run", "run/Sequential", "run/Sequential-2")] == [4, 4, 4]


def test_a_forward_pass_before_the_optimizer_is_made_and_frozen_modules_are_no_training(listening):
    model, teacher = net(), net().requires_grad_(requires_grad=False)
    with listening() as script:
        model(torch.randn(2, 8))
        teacher(torch.randn(2, 8))
        assert script.sessions == []
        train(model, 3)
    assert len(values("loss")) == 3


def test_a_fork_that_goes_on_with_its_parents_model_is_observed_for_itself(listening):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with listening(guard="skip", every=1) as script:
        train(model, 3, optimizer)
        (parent,) = script.sessions
        parents = parent.monitor
        parents.flush()
        script._forked()  # what the child of a fork is called with
        losses = train(model, 2, optimizer)
        assert [each.steps for each in script.sessions] == [2]
        parents._delivery.close()
    assert values("loss", "run/records.writer2.jsonl") == pytest.approx(losses)
    assert hooks(model) == 0


def test_a_nan_is_named_and_the_summary_has_the_worst_finding(listening, capsys):
    model = net()
    with listening():
        train(model, 5)
        with torch.no_grad():
            model[2].weight[0, 3] = float("nan")
        train(model, 2)
    said = capsys.readouterr().err.splitlines()
    worst = next(line for line in said if "the worst" in line or "nonfinite-parameter" in line)
    assert "nonfinite-parameter in '2'" in worst
    assert said[-1] == "stethoscope: see more: stethoscope report run"


def test_the_guard_keeps_a_bad_step_out(listening):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with listening(guard="raise"):
        train(model, 2, optimizer)
        (model(torch.randn(4, 8)) * float("inf")).mean().backward()
        with pytest.raises(FindingsError):
            optimizer.step()
    assert all(each.isfinite().all() for each in model.parameters())


def test_what_fails_inside_of_us_does_not_reach_the_training(listening, capsys, monkeypatch):
    monkeypatch.setattr("stethoscope.integrations._script._session.new_run", lambda *_: 1 / 0)
    with listening():
        losses = train(net(), 3)
    assert len(losses) == 3
    assert "observes nothing from here on" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_written_is_said_and_costs_nothing_else(listening, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    with listening():
        train(net(), 3)
    said = capsys.readouterr().err
    assert "part-disabled" in said
    assert "could not be written to run" in said


def test_a_compiled_model_is_found_without_a_warning_and_is_compiled_once(listening):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def one():
        torch.compiler.reset()
        compiled.clear()
        model = torch.compile(net(), backend=backend)
        return train(model, 8), [each.tolist() for each in model.parameters()], len(compiled)

    forgotten = torch.optim.SGD(net().parameters(), lr=0.1)  # the search goes on
    plain, call = one(), torch._dynamo.eval_frame.OptimizedModule.__call__
    with listening(every=4):
        assert one() == plain
    assert values("loss") == pytest.approx(plain[0])
    assert {r.module for r in records() if r.name == "activation/rms"} >= {"0", "1", "2"}
    assert torch._dynamo.eval_frame.OptimizedModule.__call__ is call
    del forgotten


def test_a_script_that_changes_its_folder_writes_where_it_was_called(listening, tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").mkdir()
    with listening(start=str(tmp_path)):
        monkeypatch.chdir("outputs")  # as Hydra does
        train(net(), 3)
    assert len(values("loss", tmp_path / "run")) == 3
    assert not list((tmp_path / "outputs").iterdir())
    assert "3 steps of Sequential: run\n" in capsys.readouterr().err


def test_a_traceback_is_the_scripts(listening):
    with listening():
        loss = net()(torch.randn(4, 8)).mean()
        loss.backward()
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
    hide(caught.value, set())
    names, trace = [], caught.value.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    assert names
    assert not [name for name in names if "integrations/_" in name]


def test_nothing_trained_is_said_once_by_the_main_process_alone(listening, capsys):
    for pid, times in ((__import__("os").getpid(), 1), (None, 0)):
        with listening(pid=pid):
            pass
        assert capsys.readouterr().err.count("no training was seen in train.py") == times


def test_folders_of_further_models_lie_below_the_first():
    assert folder("a", "Net", set()) == "a"
    assert folder("a", "Net", {"a", "a/Net"}) == "a/Net-2"
    assert folder("x/a.jsonl", "Net", {"x/a.jsonl"}) == "x/a.Net.jsonl"
