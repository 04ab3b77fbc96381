"""Steps of every kind: the guilty one is named, and nothing is written."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from stethoscope import FindingsError, Monitor

nan, inf = float("nan"), float("inf")


class Net(nn.Module):
    """Dropout and BatchNorm; `bend` is what happens between the two halves."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.drop, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)

    def bend(self, y):
        return y

    def forward(self, x):
        return self.out(self.bend(self.drop(self.norm(self.inp(x)))))[:, 0]


def make(kind=Net):
    torch.manual_seed(0)
    random.seed(0)
    return kind()


def state(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def unchanged(before, model):
    return all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def mean_square(out):
    return out.square().mean()


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("name", ["inp.weight", "norm.bias", "out.weight"])
def test_one_bad_gradient_is_named_although_clipping_has_spoilt_the_others(name, value, replay):
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(6, 4)

    def spoil(grad):
        return torch.where(torch.arange(grad.numel()).reshape(grad.shape) == 0, value, grad)

    model.get_parameter(name).register_hook(spoil)
    before = state(model)
    given = {"replay": lambda x: mean_square(model(x))} if replay else {}
    with Monitor(model, optimizer, guard="skip", strict=True, **given) as monitor:
        loss = mean_square(model(x))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert not torch.isfinite(norm)
        monitor.observe(x, loss=loss)
        optimizer.step()
        monitor.step()
    finding = monitor.findings[0]
    assert (finding.code, finding.module) == ("nonfinite-gradient", name.partition(".")[0])
    assert finding.evidence["parameter"] == name
    assert finding.evidence["gradients"] == [name]
    assert "in spoil" in finding.evidence["source"]
    at_write = finding.evidence["gradients_at_write"]
    assert at_write == ([name] if value == inf else [each for each, _ in model.named_parameters()])
    assert unchanged(before, model)


class Root(Net):
    def bend(self, y):
        return (y - y.detach()).abs().sqrt() + y


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_an_operation_of_the_model_is_named_without_a_replay_function(clip, autocast):
    model = make(Root)
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = mean_square(model(torch.randn(6, 4)))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        monitor.step(loss=loss)
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["operation"]) == ("nonfinite-gradient", "aten.sqrt")
    assert "in bend" in finding.evidence["source"]


def test_the_models_own_hooks_and_gradients_stay_after_a_step_that_was_looked_at():
    model = make(Root)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        out = model(torch.randn(6, 4))
        mean_square(out).backward()
        optimizer.step()
        monitor.step()
    assert all(each.grad is None and each._backward_hooks is None for each in model.parameters())


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_skips_by_itself_and_without_one_the_guard_decides(enabled):
    model = make(Root)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    weights = copy.deepcopy(list(model.parameters()))
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for _ in range(3):
            loss = mean_square(model(torch.randn(6, 4)))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            monitor.observe(loss=loss)
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
    assert all(map(torch.equal, weights, model.parameters()))
    found = [(each.code, each.severity, each.evidence.get("by")) for each in monitor.findings]
    if enabled:
        assert found == [("step-skipped", "info", "scaler")]
    else:
        assert found == [("nonfinite-gradient", "error", None), ("step-skipped", "info", "guard")]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("act", ["skip", "raise"])
def test_lbfgs_that_goes_wrong_after_it_has_moved_is_put_back(search, act):
    weight = nn.Linear(1, 1, bias=False)
    weight.weight.data.fill_(2.0)
    optimizer = torch.optim.LBFGS(weight.parameters(), lr=0.4, line_search_fn=search)
    x = torch.ones(3, 1)
    monitor = Monitor(weight, optimizer, guard=act, strict=True)
    seen = []

    def closure():
        optimizer.zero_grad()
        out = weight(x)
        seen.append(float(weight.weight.detach()))
        # finite at the start, not where the step leads
        loss = out.mean() + (torch.sqrt(out.mean() - 1.9) if poisoned and len(seen) < 3 else (out - 1).square().mean())
        loss.backward()
        return loss

    poisoned = False
    optimizer.step(closure)
    monitor.step()
    healthy = copy.deepcopy(optimizer.state_dict()), weight.weight.detach().clone()
    poisoned, weight.weight.data[:] = True, 2.0
    healthy = healthy[0], weight.weight.detach().clone()
    seen.clear()
    if act == "raise":
        with pytest.raises(FindingsError, match="nonfinite-loss"):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
        monitor.step()
    assert len(set(seen)) > 1
    assert torch.equal(weight.weight.detach(), healthy[1])
    after = optimizer.state_dict()["state"][0]
    assert all(
        torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        for key, value in healthy[0]["state"][0].items()
        if not isinstance(value, list)
    )
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_that_is_seen_to_evaluate_again_is_put_back_as_well():
    class Twice(torch.optim.SGD):
        """Takes two looks and a write after each, as sharpness-aware ones do."""

        def step(self, closure):
            closure()
            super().step()
            loss = closure()
            super().step()
            return loss

    model = make()
    optimizer = Twice(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for step in range(3):
            looks = 0

            def closure(step=step):
                nonlocal looks
                optimizer.zero_grad()
                loss = mean_square(model(torch.randn(6, 4))) * (nan if (step, looks) == (2, 1) else 1)
                looks += 1
                loss.backward()
                return loss

            before = copy.deepcopy(list(model.parameters()))
            optimizer.step(closure)
            monitor.step()
            assert all(map(torch.equal, before, model.parameters())) == (step == 2)
    assert monitor.findings[0].code == "nonfinite-loss"


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("who", ["critic", "generator"])
def test_of_two_optimizers_only_the_bad_one_is_kept_from_writing(who):
    model = make(Gan)
    several = {name: torch.optim.SGD(part.parameters(), 0.1) for name, part in model.named_children()}
    with Monitor(model, list(several.values()), guard="skip", strict=True) as monitor:
        for step in range(3):
            before = copy.deepcopy(model.state_dict())
            for name in ("critic", "generator"):
                for optimizer in several.values():
                    optimizer.zero_grad()
                fake = model.generator(torch.randn(6, 3))
                score = model.critic(fake.detach() if name == "critic" else fake)
                loss = score.mean() if name == "generator" else -score.square().mean()
                if step == 1 and name == who:
                    loss = loss / (loss.detach() * 0)
                loss.backward()
                monitor.observe(loss=loss)
                several[name].step()
            monitor.step()
            moved = {
                name.partition(".")[0] for name, each in model.named_parameters() if not torch.equal(each, before[name])
            }
            assert moved == ({"critic", "generator"} - ({who} if step == 1 else set()))
    assert [(each.code, each.step) for each in monitor.findings] == [("nonfinite-loss", 1), ("step-skipped", 2)]


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("bad", [0, 2])
def test_of_several_micro_batches_the_bad_one_is_found(bad, replay):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {"replay": lambda batch: mean_square(model(batch["x"])) / 3} if replay else {}
    with Monitor(model, optimizer, guard="skip", strict=True, **given) as monitor:
        for part in range(3):
            x = torch.randn(6, 4)
            if part == bad:
                x[4, 0] = nan
            batch = {"x": x}
            loss = mean_square(model(x)) / 3
            loss.backward()
            monitor.observe(batch, loss=loss)
        optimizer.step()
        monitor.step(batch)
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["samples"]) == ("nonfinite-input", [4])


def test_random_numbers_of_each_micro_batch_are_those_it_had():
    class Lucky(Net):
        def bend(self, y):
            return y / (torch.rand(()) > 0.2)

    model = make(Lucky)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", strict=True, replay=lambda x: mean_square(model(x))) as monitor:
        for _ in range(12):
            x = torch.randn(6, 4)
            loss = mean_square(model(x))
            loss.backward()
            monitor.observe(x, loss=loss)
            if not torch.isfinite(loss):
                break
        assert not torch.isfinite(loss)
        optimizer.step()
        monitor.step()
    assert monitor.findings[0].evidence["operation"] == "aten.div"


@pytest.mark.parametrize(
    "form", [lambda loss: {"loss": loss, "aux": torch.tensor(nan)}, lambda loss: (loss, {"aux": 1.0})]
)
def test_a_loss_may_be_a_dictionary_or_a_tuple(form):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x):
        out = model(x)
        return form(torch.log(out.square().mean() * (0 if x[0, 0] > 9 else 1)))

    with Monitor(model, optimizer, guard="skip", replay=step, strict=True) as monitor:
        for i in range(3):
            x = torch.randn(6, 4)
            x[0, 0] = 10.0 if i == 1 else 0.0
            optimizer.zero_grad()
            result = step(x)
            (result["loss"] if isinstance(result, dict) else result[0]).backward()
            monitor.observe(x, loss=result)
            optimizer.step()
            monitor.step()
    assert [each.step for each in monitor.findings if each.severity == "error"] == [1]
    assert (monitor.findings[0].code, monitor.findings[0].evidence["operation"]) == ("nonfinite-loss", "aten.log")


def test_inputs_above_the_limit_are_not_kept_and_the_finding_says_so(monkeypatch):
    monkeypatch.setattr("stethoscope._before.MAX_BYTES", 100)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        x = torch.randn(7, 4)
        x[2] = nan
        loss = mean_square(model(x))
        loss.backward()
        assert monitor._guard._before.calls == []
        optimizer.step()
        monitor.step()
    assert monitor.findings[0].code == "nonfinite-gradient"
    assert "1 calls of the model were not kept" in monitor.findings[0].message


class Raises(Net):
    def bend(self, y):
        if getattr(self, "again", False):
            raise KeyError("no second time")
        self.again = True
        return y


@pytest.mark.parametrize("act", ["skip", "raise"])
@pytest.mark.parametrize("replay", [True, False])
def test_a_model_that_raises_when_it_is_run_again_does_not_let_the_bad_step_through(act, replay):
    model = make(Raises)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = state(model)
    given = {"replay": lambda x: mean_square(model(x)) * nan} if replay else {}
    monitor = Monitor(model, optimizer, guard=act, strict=True, **given)
    x = torch.randn(6, 4)
    loss = mean_square(model(x)) * nan
    loss.backward()
    monitor.observe(x, loss=loss)
    if act == "raise":
        with pytest.raises(FindingsError, match="KeyError"):
            optimizer.step()
    else:
        optimizer.step()
        monitor.step()
    monitor.close()
    assert unchanged(before, model)
    finding = monitor.findings[0]
    assert finding.code == "nonfinite-loss"
    assert "run again, the step raised KeyError: 'no second time'" in finding.message


class Chance(Net):
    """Not to be repeated: its luck is in no random state."""

    turns = 0

    def bend(self, y):
        type(self).turns += 1
        return y * (nan if type(self).turns == 3 else 1)


@pytest.mark.parametrize("replay", [True, False])
def test_a_step_that_cannot_be_repeated_is_said_to_differ(replay):
    Chance.turns = 0
    model = make(Chance)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {"replay": lambda x: mean_square(model(x))} if replay else {}
    with Monitor(model, optimizer, guard="skip", strict=True, **given) as monitor:
        for _ in range(4):
            x = torch.randn(6, 4)
            optimizer.zero_grad()
            loss = mean_square(model(x))
            loss.backward()
            monitor.observe(x, loss=loss)
            optimizer.step()
            monitor.step()
    finding = monitor.findings[0]
    assert (finding.code, finding.step) == ("nonfinite-loss", 2)
    assert finding.evidence["replay"] == ("differed" if replay else "finite")
    said = "run again, the step is finite: the replay differed" if replay else "run again, the forward pass is finite"
    assert said in finding.message
    assert all(torch.isfinite(each).all() for each in model.parameters())


@pytest.mark.parametrize("act", ["skip", "raise"])
def test_a_cause_that_cannot_be_looked_for_does_not_let_the_bad_step_through(act, monkeypatch):
    monkeypatch.setattr("stethoscope._before.Before.rewind", lambda self: 1 / 0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weights = copy.deepcopy(list(model.parameters()))
    monitor = Monitor(model, optimizer, guard=act)
    (mean_square(model(torch.randn(6, 4))) * nan).backward()
    if act == "raise":
        with pytest.raises(FindingsError, match="ZeroDivisionError"):
            optimizer.step()
    else:
        optimizer.step()
        monitor.step()
    monitor.close()
    assert all(map(torch.equal, weights, model.parameters()))
    assert "its cause is not known (ZeroDivisionError" in monitor.findings[0].message


def test_a_replay_function_without_a_batch_is_not_used():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", replay=lambda x: 1 / 0, strict=True) as monitor:
        (mean_square(model(torch.randn(6, 4))) * nan).backward()
        optimizer.step()
        monitor.step()
    assert "run again, the forward pass is finite" in monitor.findings[0].message
    assert "monitor.observe(batch)" in monitor.findings[0].advice


def test_steps_count_on_after_resuming():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer) as first:
        first.step()
        first.step()
        kept = first.state_dict()
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        monitor.load_state_dict(kept)
        (mean_square(model(torch.randn(6, 4))) * nan).backward()
        optimizer.step()
        monitor.step()
    assert monitor.findings[0].step == 2


def test_outputs_keep_no_gradient_beyond_their_step():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        x = torch.randn(6, 4)
        mean_square(model(x)).backward()
        (call,) = monitor._guard._before.calls
        assert list(call.grad_outputs) == [""]
        optimizer.step()
        monitor.step()
        assert monitor._guard._before.calls == []


def test_a_module_that_returns_a_parameter_keeps_no_hook():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.table

    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        model().sum().backward()
        optimizer.step()
        monitor.step()
    assert not model.table._backward_hooks


def test_gradients_per_sample_are_looked_at_and_their_calls_left_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    with Monitor(model, optimizer, guard="skip", sinks=[tmp_path], strict=True) as monitor:
        for step in range(3):
            x = torch.randn(5, 4)
            x[2, 1] = nan if step == 1 else 0.0
            own = {name: each.detach() for name, each in model.named_parameters()}
            found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x)
            for name, each in model.named_parameters():
                each.grad = found[name].mean(0)
            optimizer.step()
            monitor.step()
    assert [(each.code, each.step) for each in monitor.findings] == [("nonfinite-gradient", 1), ("step-skipped", 2)]
    assert "no call of the model was seen" in monitor.findings[0].message
    assert all(torch.isfinite(each).all() for each in model.parameters())


def test_other_ranks_keep_incidents_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, guard="skip", sinks=[tmp_path], strict=True) as monitor:
        mean_square(model(torch.full((6, 4), nan))).backward()
        optimizer.step()
        monitor.step()
    assert [each.name for each in (tmp_path / "incidents").iterdir()] == ["step0-rank3"]
