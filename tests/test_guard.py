from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stethoscope import FindingsError, Monitor, presets, sinks

nan, inf = float("nan"), float("inf")


class Net(nn.Module):
    """Dropout and BatchNorm before a square root; one random number of Python per call."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.drop, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)

    def forward(self, x):
        y = self.drop(self.norm(F.relu(self.inp(x)))) * (1 + 0.01 * random.random())
        return self.out(y)[:, 0]


def make(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    model = Net()
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def batches(n, bad=(), value=nan):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(6, 4, generator=generator) for _ in range(n)]
    for i in bad:
        made[i][2, 1] = value
    return made


def train(model, optimizer, data, monitor=None, *, clip=False, loss_of=lambda out: out.square().mean(), given=True):
    for x in data:
        loss = loss_of(model(x))
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if monitor is not None and given:
            monitor.observe(batch=x, loss=loss)
        optimizer.step()
        if monitor is not None:
            monitor.step(loss=loss)


def state(model, optimizer):
    return copy.deepcopy([*model.state_dict().values(), *[v for s in optimizer.state.values() for v in s.values()]])


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("guard", [None, "raise", "skip"])
def test_a_healthy_training_is_bit_identical(guard):
    plain = make()
    train(*plain, batches(8), clip=True)
    rng = torch.get_rng_state(), random.getstate()
    seen = make()
    with Monitor(*seen, guard=guard, **presets.first_aid(), every=2, strict=True) as monitor:
        train(*seen, batches(8), monitor, clip=True)
    assert same(state(*plain), state(*seen))
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    assert monitor.findings == []


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("value", [nan, inf])
def test_a_skipped_step_has_never_been(clip, given, value):
    data = batches(8, bad=[3, 4], value=value)
    plain = make()
    train(*plain, [x for i, x in enumerate(data) if i not in (3, 4)], clip=clip)
    rng = torch.get_rng_state(), random.getstate()
    seen = make()
    memory = sinks.Memory()
    with Monitor(*seen, guard="skip", sinks=[memory], strict=True) as monitor:
        train(*seen, data, monitor, clip=clip, given=given)
    assert same(state(*plain), state(*seen))
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    first, last = monitor.findings
    assert (first.code, first.step) == ("nonfinite-input", 3)
    assert first.evidence["samples"] == [2]
    assert "The step was skipped." in first.message
    assert (last.code, last.evidence["skipped"], last.evidence["steps"]) == ("step-skipped", 2, 8)
    assert [(r.step, r.value) for r in memory.records if r.name == "guard/skipped"] == [
        (3, 1.0),
        *[(i, 2.0) for i in range(4, 8)],
    ]


def test_raise_leaves_weights_statistics_and_random_numbers_as_they_were():
    data = batches(5, bad=[3])
    model, optimizer = make()
    plain = make()
    train(*plain, data[:3])
    before, rng = state(*plain), (torch.get_rng_state(), random.getstate())
    model, optimizer = make()
    found = []
    monitor = Monitor(model, optimizer, guard="raise", on_finding=found.append, strict=True)
    with pytest.raises(FindingsError, match=r"nonfinite-input at step 3") as caught:
        train(model, optimizer, data, monitor)
    assert same(before, state(model, optimizer))
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    assert found == list(caught.value.findings) == monitor.findings
    monitor.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def sqrt_loss(out):
    return (out - out.detach()).square().sum().sqrt()


def test_replay_names_the_operation_of_a_fault_that_is_born_in_backward():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", replay=lambda x: sqrt_loss(model(x)), strict=True) as monitor:
        train(model, optimizer, batches(2), monitor, clip=True, loss_of=sqrt_loss)
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["operation"]) == ("nonfinite-gradient", "aten.sqrt")
    assert "sqrt_loss" in finding.evidence["source"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("replay", [False, True])
def test_a_loss_that_is_nan_is_the_loss(replay):
    model, optimizer = make()

    def log_loss(out):
        return torch.log(-out.square().mean())

    arguments = {"replay": lambda x: log_loss(model(x))} if replay else {}
    with Monitor(model, optimizer, guard="skip", strict=True, **arguments) as monitor:
        train(model, optimizer, batches(1), monitor, loss_of=log_loss)
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["origin"]) == ("nonfinite-loss", "loss")
    assert finding.evidence.get("operation", "aten.log") == "aten.log"
    assert "nan" in finding.evidence["loss"]


def test_one_nan_gradient_names_its_parameter_before_clipping():
    model, optimizer = make()
    model.out.weight.register_hook(lambda grad: grad * nan)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        train(model, optimizer, batches(1), monitor)
    finding = monitor.findings[0]
    assert (finding.code, finding.module) == ("nonfinite-gradient", "out")
    assert finding.evidence["parameter"] == "out.weight"
    model, optimizer = make()
    model.out.weight.register_hook(lambda grad: grad * nan)
    with Monitor(model, optimizer, guard="skip", replay=lambda x: model(x).mean(), strict=True) as monitor:
        train(model, optimizer, batches(1), monitor, clip=True)  # which spoils all others
    assert monitor.findings[0].evidence["gradients_at_write"][0] == "inp.weight"
    assert "1 gradients: out.weight" in monitor.findings[0].message


def test_large_finite_gradients_are_no_fault():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="raise", strict=True) as monitor:
        train(model, optimizer, batches(3), monitor, loss_of=lambda out: out.sum() * 1e30)
    assert monitor.findings == []


def test_a_finding_comes_again_only_after_a_good_step():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        train(model, optimizer, batches(6, bad=[0, 1, 4]), monitor)
    assert [f.step for f in monitor.findings if f.code == "nonfinite-input"] == [0, 4]


def test_the_steps_that_a_scaler_skips_are_no_fault():
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 * 1.9)
    with Monitor(model, optimizer, guard="raise", strict=True) as monitor:
        for x in batches(6):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (model(x) * 100).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss=loss)
    assert [(f.code, f.severity, f.evidence["by"]) for f in monitor.findings] == [("step-skipped", "info", "scaler")]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_scaler_does_not_hide_a_loss_that_is_not_finite(fused, clip):
    model, _ = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = None
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for i, x in enumerate(batches(5, bad=[3])):
            before = state(model, optimizer) if i == 3 else before
            loss = model(x).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            monitor.observe(loss=loss)
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss=loss)
            if i == 3:
                # all but the steps that a fused optimizer counts before it asks the scaler
                buffers = [a for a in zip(before, state(model, optimizer), strict=True) if a[0].dim()]
                assert all(torch.equal(a, b) for a, b in buffers)
    found = [(f.code, f.step, f.evidence.get("by")) for f in monitor.findings]
    assert found == [("nonfinite-input", 3, None), ("step-skipped", 4, "guard")]
    assert all(torch.isfinite(each).all() for each in model.state_dict().values())


def test_a_loss_that_is_not_finite_is_raised_when_the_scaler_has_skipped_its_step():
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    with Monitor(model, optimizer, guard="raise", strict=True) as monitor:
        (x,) = batches(1, bad=[0])
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        with pytest.raises(FindingsError, match=r"args\.0"):
            monitor.step(loss=loss)
        assert monitor.state_dict()["step"] == 1
    assert [f.code for f in monitor.findings] == ["nonfinite-input"]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adam])
def test_an_optimizer_with_a_closure(kind):
    model, _ = make()
    optimizer = kind(model.parameters(), lr=0.1)
    data = batches(4, bad=[2])
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for i, x in enumerate(data):

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            before = state(model, optimizer)[:4]
            optimizer.step(closure)
            assert same(before, state(model, optimizer)[:4]) == (i == 2)
            monitor.step()
    assert [(f.code, f.step) for f in monitor.findings[:1]] == [("nonfinite-input", 2)]


def test_several_optimizers_and_a_model_without_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    model = Two()
    several = [torch.optim.SGD(part.parameters(), 0.1) for part in (model.left, model.right)]
    with torch.no_grad():
        model.right.weight[0, 0] = nan
    before = copy.deepcopy(model.state_dict())
    with Monitor(model, several, guard="skip", strict=True) as monitor:
        x = torch.randn(3, 4)
        model.left(x).sum().backward()
        model.right(x).sum().backward()
        loss = model.right(model.left(x).detach()).square().sum()
        loss.backward()
        monitor.observe(loss=model.left(x).sum())
        for optimizer in several:
            optimizer.step()
        monitor.step()
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["parameter"]) == ("nonfinite-parameter", "right.weight")
    assert not torch.equal(before["left.weight"], model.left.weight)
    assert torch.equal(before["right.weight"].nan_to_num(), model.right.weight.nan_to_num())


def test_several_optimizers_share_one_skipped_step_and_one_finding():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)

        def forward(self, x):
            return self.out(self.table(x))

    model = Sparse()
    several = [torch.optim.SparseAdam(model.table.parameters()), torch.optim.SGD(model.out.parameters(), 0.1)]
    with Monitor(model, several, guard="skip", strict=True) as monitor:
        for step in range(4):
            for optimizer in several:
                optimizer.zero_grad()
            for _ in range(2):
                loss = model(torch.tensor([[1, 2], [3, 4]])).sum() * (nan if step == 1 else 1)
                loss.backward()
            monitor.observe(loss=loss)
            for optimizer in several:
                optimizer.step()
            monitor.step(loss=loss)
    assert [(f.code, f.step) for f in monitor.findings] == [("nonfinite-loss", 1), ("step-skipped", 3)]
    assert monitor.findings[-1].evidence["skipped"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_repeated_step_leaves_no_records():
    memory = sinks.Memory()
    model, optimizer = make()
    with Monitor(
        model, optimizer, guard="skip", sinks=[memory], **presets.first_aid(), every=1, strict=True
    ) as monitor:
        train(model, optimizer, batches(3, bad=[1]), monitor)
    calls = [r for r in memory.records if r.name == "activation/rms" and r.module == "out"]
    assert sorted((r.step, r.call) for r in calls) == [(0, 0), (1, 0), (2, 0)]


def test_a_copy_of_a_guarded_model_is_free():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        copied = copy.deepcopy(model)
        copied(torch.randn(3, 4))
        assert monitor._guard._before.calls == []


def test_a_guard_that_fails_is_taken_off_and_says_so(monkeypatch):
    model, optimizer = make()
    monkeypatch.setattr("stethoscope._guard.fetch", lambda numbers: 1 / 0)
    with Monitor(model, optimizer, guard="skip") as monitor:
        train(model, optimizer, batches(3), monitor)
    assert [f.code for f in monitor.findings] == ["part-disabled"]
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("lr", [nan, inf])
def test_a_learning_rate_that_is_no_number_is_not_used(lr):
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        train(model, optimizer, batches(1), monitor)
        optimizer.param_groups[0]["lr"] = lr
        before = copy.deepcopy(list(model.parameters()))
        train(model, optimizer, batches(1), monitor)
    assert same(before, list(model.parameters()))
    finding = monitor.findings[0]
    assert (finding.code, finding.step) == ("nonfinite-optimizer", 1)
    assert "lr of parameter group 0" in finding.message


def test_a_weight_that_the_optimizer_spoils_is_the_optimizers_fault():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[1].parameters(), "eps": 0.0}])
    model[1].bias.register_hook(lambda grad: grad * 0)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        train(model, optimizer, batches(3), monitor)
    finding = monitor.findings[0]
    assert (finding.code, finding.step, finding.module) == ("nonfinite-optimizer", 1, "1")
    assert (finding.evidence["parameter"], finding.evidence["group"]) == ("1.bias", 1)
    assert finding.evidence["settings"]["eps"] == "0.0"


def test_a_second_moment_that_is_negative_is_named():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        train(model, optimizer, batches(2), monitor)
        optimizer.state[model.out.weight]["exp_avg_sq"][0, 3] = -1.0
        train(model, optimizer, batches(2), monitor)
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["parameter"]) == ("nonfinite-optimizer", "out.weight")
    assert finding.evidence["state"]["exp_avg_sq"].startswith("negative")
    assert finding.evidence["state"]["exp_avg"] == "finite"


class CalledByItsLayers(nn.Module):
    """Has a forward, but the training calls its layers, as Lightning's training_step does."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 1))])

    def forward(self, x):
        return self.stages[1](self.stages[0](x))


@pytest.mark.parametrize("whole", [True, False])
def test_the_outermost_calls_are_followed_whatever_is_called(whole):
    model = CalledByItsLayers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for step in range(5):
            x = torch.randn(6, 4)
            if step == 3:
                x[2] = torch.nan
            loss = (model(x) if whole else model.stages[1](model.stages[0](x))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert [(f.code, f.step, f.evidence["samples"]) for f in monitor.findings if f.severity == "error"] == [
        ("nonfinite-input", 3, [2])
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_part_is_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Tanh()), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for scale in (1.0, torch.nan):
            optimizer.zero_grad()
            loss = model(torch.full((6, 4), scale)).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert all(p.isfinite().all() for p in model.parameters())


def test_probes_keep_what_they_have_read_of_a_step_that_is_repeated():
    model, optimizer = make()
    memory = sinks.Memory()
    with Monitor(model, optimizer, guard="skip", sinks=memory, strict=True, **presets.first_aid()) as monitor:
        train(model, optimizer, batches(2, bad=[0]), monitor)
    assert "probe-read-nothing" not in {each.code for each in monitor.findings}
    bad = {r.module for r in memory.records if r.name == "gradient/nonfinite" and r.step == 0 and r.value}
    assert {"inp.weight", "out.bias"} <= bad


def test_the_watch_names_a_weight_that_was_bad_before_the_repeated_step():
    model, optimizer = make()
    with torch.no_grad():
        model.out.weight[0, 3] = nan
    with Monitor(model, optimizer, guard="skip", strict=True, **presets.first_aid()) as monitor:
        train(model, optimizer, batches(1), monitor)
    assert [f.evidence["parameter"] for f in monitor.findings if f.code == "nonfinite-parameter"] == 2 * ["out.weight"]


@pytest.mark.parametrize("spoilt", ["optimizer", "input"])
def test_the_watch_says_what_the_guard_has_found_as_the_cause(spoilt):
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True, **presets.first_aid()) as monitor:
        train(model, optimizer, batches(2), monitor)
        if spoilt == "optimizer":
            optimizer.state[model.out.weight]["exp_avg_sq"][0, 2] = -1.0
        train(model, optimizer, batches(2, bad=[1] if spoilt == "input" else ()), monitor)
    found = [(f.code, f.cause) for f in monitor.findings if f.code != "step-skipped"]
    assert found[0] == (f"nonfinite-{spoilt}", "")
    assert found[1:] == [
        ("nonfinite-parameter" if spoilt == "optimizer" else "nonfinite-activation", f"nonfinite-{spoilt}")
    ]


def test_a_loop_that_catches_the_error_may_close_the_step():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="raise", strict=True) as monitor:
        for i, x in enumerate(batches(4, bad=[2])):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.observe(loss=loss)
            if i == 2:
                with pytest.raises(FindingsError):
                    optimizer.step()
            else:
                optimizer.step()
            monitor.step(loss=loss)
    assert [(f.code, f.step) for f in monitor.findings] == [("nonfinite-input", 2)]


def test_messages_name_what_there_is():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        loss = model(torch.randn(6, 4)).square().mean()
        loss.backward()
        for each in model.out.parameters():
            each.grad.fill_(nan)
        optimizer.step()
        monitor.step(loss=loss)
    bad, skipped = (f.message for f in monitor.findings)
    assert bad.startswith("2 gradients (out.weight, out.bias) are not finite")
    assert skipped == "The guard has skipped 1 of 1 steps."


def test_a_batch_that_is_changed_after_its_call_is_told():
    model, optimizer = make()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        (x,) = batches(1, bad=[0])
        loss = model(x).square().mean()
        loss.backward()
        x.zero_()
        monitor.observe(loss=loss)
        optimizer.step()
        monitor.step(loss=loss)
    assert "but an input was changed in place after the model had been called with it" in monitor.findings[0].message
