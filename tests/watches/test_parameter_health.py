from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.testing import replay
from stethoscope.watches import ParameterHealth


def mlp(depth=3, width=32, init=None):
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else 8, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 4))
    for layer in model:
        if init and isinstance(layer, nn.Linear):
            init(layer.weight)
    return model


def train(model, optimizer=None, *, forward=None, steps=60, every=5, before=None, after=None, planned=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    with Monitor(
        model, optimizer, watches=[ParameterHealth()], every=every, planned_steps=planned, strict=True
    ) as monitor:
        for step in range(steps):
            x = torch.randn(16, 8, generator=generator).to(next(model.parameters()).dtype)
            loss = nn.functional.cross_entropy((forward or model)(x).float(), x[:, :4].argmax(1))
            optimizer.zero_grad(set_to_none=before is None)
            loss.backward()
            if before:
                before(step)
            optimizer.step()
            if after:
                after(step)
            monitor.step(loss=loss)
    return [(f.code, f.severity, f.module) for f in monitor.findings]


def test_rates_too_high_and_too_low():
    model = mlp()
    assert train(model, torch.optim.Adam(model.parameters(), lr=1.0), steps=12)[0][0] == "update-ratio-high"
    for make, rate in ((torch.optim.SGD, 1e-7), (torch.optim.Adam, 1e-9), (torch.optim.Adam, 0.0)):
        model = mlp()
        found = train(model, make(model.parameters(), lr=rate))
        assert ("update-ratio-low", "warning", "") in found


def test_a_warm_up_from_zero_is_no_low_rate():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-6 * step)
    assert train(model, optimizer, after=lambda _: warm_up.step()) == []


def test_a_rate_that_ends_at_zero_is_no_low_rate():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step > 20 else 1.0)
    assert train(model, optimizer, after=lambda _: decay.step()) == []


def test_an_optimizer_of_other_parameters_changes_nothing():
    model = mlp()
    found = train(model, torch.optim.Adam([p.detach().clone().requires_grad_() for p in model.parameters()]))
    assert found == [("parameter-unchanged", "warning", "0")]


def test_what_gets_gradients_and_no_optimizer_holds_is_told_however_much_it_is():
    for start in (2, 6):
        model = mlp()
        found = train(model, torch.optim.Adam(list(model.parameters())[start:]))
        assert found == [("parameter-unchanged", "warning", "0")]


def test_what_is_thawed_after_the_optimizer_was_built_is_told_and_what_is_added_to_it_is_not():
    def run(add):
        model = mlp()
        model[:4].requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def thaw(step):
            if step == 20:
                model[:4].requires_grad_(True)
                if add:
                    optimizer.add_param_group({"params": list(model[:4].parameters())})

        return train(model, optimizer, after=thaw)

    assert run(add=False) == [("parameter-unchanged", "warning", "0")]
    assert run(add=True) == []


def test_a_teacher_that_nobody_has_frozen_is_an_aside():
    model = nn.ModuleDict({"student": mlp(), "teacher": mlp(depth=4)})

    def forward(x):
        with torch.no_grad():
            soft = model["teacher"](x)
        return model["student"](x) + 0.1 * soft

    found = train(model, torch.optim.Adam(model["student"].parameters()), forward=forward)
    assert found == [("parameter-unchanged", "info", "teacher.0")]


@pytest.mark.parametrize(("started", "steps"), [(False, 60), (True, 60), (False, 150)])
def test_a_critic_whose_optimizer_waits_is_an_aside_for_a_while(started, steps):
    model = nn.ModuleDict({"g": mlp(), "d": nn.Linear(4, 1)})
    both = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in model.values()]
    with Monitor(model, both, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for step in range(steps):
            model.zero_grad()
            loss = model["d"](model["g"](torch.randn(16, 8))).square().mean()
            loss.backward()
            both[0].step()
            if started and step % 7 == 0:
                both[1].step()
            monitor.step(loss=loss)
    told = [("parameter-unchanged", "info"), ("parameter-unchanged", "warning")][: 1 + steps // 100]
    assert [(f.code, f.severity) for f in monitor.findings] == ([] if started else told)


def test_steps_below_the_resolution_of_bfloat16():
    model = mlp().bfloat16()
    codes = [code for code, *_ in train(model, torch.optim.SGD(model.parameters(), lr=1e-5))]
    assert "parameter-unchanged" in codes


def test_momentum_moves_what_was_frozen_and_a_moving_average_is_an_info():
    model = mlp()

    def freeze(step):
        if step == 10:
            model[0].requires_grad_(False)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    assert train(model, optimizer, before=freeze) == [("parameter-changed", "warning", "0")]
    model = mlp()
    average = nn.Sequential(nn.Linear(8, 32)).requires_grad_(False)
    model.add_module("average", average)

    def follow(_):
        with torch.no_grad():
            average[0].weight.lerp_(model[0].weight, 0.01)

    found = train(model, forward=model[:-1], after=follow)
    assert found == [("parameter-changed", "info", "average.0")]


@pytest.mark.parametrize("init", [nn.init.normal_, lambda w: nn.init.normal_(w, std=1e-3), nn.init.zeros_])
def test_initialisations_that_lose_or_blow_up_the_signal(init):
    assert train(mlp(init=init))[0][0] == "poor-initialisation"


@pytest.mark.parametrize(
    "init",
    [
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        nn.init.orthogonal_,
        nn.init.eye_,
        lambda w: nn.init.trunc_normal_(w, std=0.02),
    ],
)
def test_usual_initialisations_are_fine(init):
    assert train(mlp(init=init)) == []


def test_equal_weights_stay_equal_where_they_share_a_gradient():
    found = train(mlp(init=lambda w: nn.init.constant_(w, 0.05)))
    assert found[:2] == [("poor-initialisation", "warning", "0"), ("units-symmetric", "warning", "0")]
    last = mlp()
    nn.init.constant_(last[-1].weight, 0.05)
    assert train(last) == []


def test_weights_that_decay_away():
    model = mlp()
    found = train(model, torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=2.0), steps=100)
    assert ("weight-norm-drift", "warning", "") in found


@pytest.mark.parametrize(
    ("optimizer", "rate", "decay"), [("AdamW", 0.1, 0.5), ("SGD", 0.5, 0.1), ("Adafactor", 0.1, 0.2)]
)
def test_decay_that_takes_percents_per_step_is_told_from_its_settings(optimizer, rate, decay):
    model = mlp()
    found = train(model, getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=decay), steps=20)
    assert ("weight-norm-drift", "warning", "") in found


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("AdamW", {"lr": 1e-3, "weight_decay": 1.0}),  # what grokking is shown with
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
        ("Adam", {"lr": 1e-3, "weight_decay": 20.0}),  # bounded by the learning rate
        ("Adafactor", {"lr": 1e-2, "weight_decay": 0.1}),
    ],
)
def test_usual_decay_is_fine(optimizer, settings):
    model = mlp()
    found = train(model, getattr(torch.optim, optimizer)(model.parameters(), **settings))
    assert "weight-norm-drift" not in [code for code, *_ in found]


def test_a_norm_that_falls_to_a_seventh_is_told_where_decay_is_strong():
    def records(decay):
        for step in range(0, 100, 10):
            yield Record("parameter/norm", 7.0 if step < 50 else 1.0, step, "a.weight")
            yield Record("optimizer/decay", decay, step)

    codes = [f.code for f in replay(ParameterHealth(), list(records(5e-3)))]
    assert codes == ["weight-norm-drift"]
    assert replay(ParameterHealth(), list(records(1e-5))) == []


class Blocks(nn.Module):
    """Pre-norm blocks; the second norm of each may be forgotten."""

    def __init__(self, forgotten):
        super().__init__()
        self.inner, self.head, self.forgotten = nn.Linear(8, 16), nn.Linear(16, 4), forgotten
        parts = {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: make(16) for name, make in parts.items()}
                | {"attention": nn.MultiheadAttention(16, 2, batch_first=True), "mlp": nn.Linear(16, 16)}
            )
            for _ in range(3)
        )

    def forward(self, x):
        x = self.inner(x)[:, None]
        for i, block in enumerate(self.blocks):
            y = block["norm1"](x)
            x = x + block["attention"](y, y, y)[0]
            x = x + block["mlp"](x if i in self.forgotten else block["norm2"](x)).tanh()
        return self.head(x[:, 0])


def test_a_part_that_is_called_in_no_block_is_told_and_one_left_over_is_an_aside():
    assert train(Blocks((0, 1, 2))) == [("module-unused", "warning", "blocks.0.norm2")]
    assert train(Blocks((2,))) == [("module-unused", "info", "blocks.2.norm2")]


class FirstOf(nn.Module):
    """Runs the first of a list alone, in front of the head or as the head."""

    def __init__(self, heads):
        super().__init__()
        self.trunk, self.parts = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 4 if heads else 8) for _ in range(3))
        self.head = nn.Identity() if heads else nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.parts[0](self.trunk(x).tanh()))


def test_all_but_the_first_of_a_list_are_told_where_something_follows():
    aside = ("module-unused", "info", "parts.1")  # a model that grows begins with its first block
    assert train(FirstOf(heads=False), planned=60) == [aside, ("module-unused", "warning", "parts.1")]
    assert train(FirstOf(heads=False)) == [aside]
    assert train(FirstOf(heads=True)) == [("module-unused", "info", "parts.1")]
    assert train(Blocks(())) == []


class Outer(torch.optim.Optimizer):
    """As SAM and Lookahead: another optimizer steps inside of its step, on the same parameters."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


def test_two_optimizers_that_use_one_gradient_are_told():
    model = mlp()
    second = torch.optim.SGD(model[-1].parameters(), lr=1e-3)
    assert train(model, after=lambda _: second.step()) == [("optimizer-duplicate-parameters", "warning", "6")]
    model = mlp()
    clipped = torch.optim.SGD(model[-1].parameters(), lr=1e-3)

    def clip(_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        clipped.step()

    assert ("optimizer-duplicate-parameters", "warning", "6") in train(model, after=clip)


def test_one_optimizer_that_lists_a_parameter_twice_is_told():
    model = mlp()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), *model[-1].parameters()], lr=1e-2)
    assert train(model, optimizer) == [("optimizer-duplicate-parameters", "warning", "6")]


def test_a_wrapper_around_an_optimizer_is_one():
    model = mlp()
    assert train(model, Outer(torch.optim.SGD(model.parameters(), lr=0.01))) == []


def test_optimizers_that_take_turns_or_have_a_loss_each_may_share_parameters():
    model = mlp()
    adam, lbfgs = torch.optim.Adam(model.parameters(), lr=1e-3), torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, [adam, lbfgs], watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for step in range(60):
            for optimizer in (adam if step < 30 else lbfgs,) if step < 40 else (adam, lbfgs):
                loss = model(torch.randn(16, 8)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            monitor.step(loss=loss)
    assert [f.code for f in monitor.findings] == []


def test_tasks_that_take_turns_in_step_with_the_looks():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 4) for name in ("inner", "first", "second", "never")})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[ParameterHealth()], every=10, strict=True) as monitor:
        for step in range(60):
            x = torch.randn(16, 8)
            head = model["second" if step % 2 else "first"]
            loss = (model["inner"](x) + head(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert [(f.code, f.module) for f in monitor.findings] == [("module-unused", "never")]


def test_a_module_that_never_runs_and_one_whose_output_is_not_used():
    model = mlp()
    model.add_module("extra", nn.Linear(4, 4))
    assert train(model, forward=model[:-1]) == [("module-unused", "warning", "extra")]
    assert train(model, forward=lambda x: (model.extra(model[:-1](x)), model[:-1](x))[1]) == [
        ("module-unused", "info", "extra")
    ]


@pytest.mark.parametrize(("name", "told"), [("correction", ["info", "warning"]), ("pooler", ["info"])])
def test_a_branch_that_is_not_added_is_a_warning_once_nothing_more_is_to_be_thawed(name, told):
    model = mlp()
    model.add_module(name, nn.Linear(4, 4))
    found = train(model, forward=lambda x: (model[-1](model[:-1](x)), model[:-1](x))[1], planned=100)
    assert found == [("module-unused", severity, name) for severity in told]


def test_state_that_became_infinite():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def spoil(step):
        if step == 20:
            optimizer.state[model[2].weight]["exp_avg_sq"][0, 0] = torch.inf

    assert train(model, optimizer, after=spoil) == [("nonfinite-optimizer", "error", "2")]


@pytest.mark.parametrize("zero", ["gamma", "scalar", "adapter"])
def test_branches_that_begin_at_zero_are_fine(zero):
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.down, self.up = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 16)
            self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)
            self.scale = nn.Parameter(torch.tensor(0.0 if zero == "scalar" else 1.0))
            if zero == "gamma":
                nn.init.zeros_(self.norm.weight)
            if zero == "adapter":
                nn.init.zeros_(self.up.weight)
                self.inner.requires_grad_(False)

        def forward(self, x):
            x = self.inner(x)
            return self.head(x + self.scale * self.norm(self.up(self.down(x))))

    assert train(Residual()) == []


NAMES = ["norm", "update_ratio", "unchanged", "role", "held", "gain", "copies", "optimizers"]
anything = st.builds(
    Record,
    st.sampled_from(
        [f"parameter/{n}" for n in NAMES]
        + ["gradient/norm", "optimizer/steps", "optimizer/nonfinite", "optimizer/known", "optimizer/decay", "lr"]
    ),
    st.floats() | st.integers(0, 4).map(float),
    st.integers(0, 5),
    st.sampled_from(["", "a.w", "b.w", "c.w"]),
)


@given(st.lists(anything, max_size=60))
def test_whatever_comes_in_the_state_is_json(records):
    watch = ParameterHealth(steps=0, observations=1)
    state = watch.init()
    for record in sorted(records, key=lambda r: r.step):
        state, _ = watch.update(state, [record._replace(source="step") if record.name == "lr" else record])
    state, _ = watch.update(state, records)
    json.dumps(state, allow_nan=False)


def moody():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))


def test_a_model_that_is_left_in_eval_mode_is_told():
    told = ("model-in-eval", "warning", "")
    assert train(moody()) == []
    assert told in train(moody().eval())
    model = moody()  # a validation that does not go back
    assert train(model, after=lambda step: model.eval() if step == 20 else None) == [told]


def test_parts_in_eval_mode_and_models_that_do_not_care_are_well():
    model = moody()
    model[1].eval()
    assert train(model) == []
    model = moody().eval()
    model.training = True  # a wrapper around a backbone that is frozen
    assert train(model) == []
    assert [code for code, *_ in train(mlp().eval())] == ["probe-read-nothing"]


def test_what_is_left_out_at_random_or_not_chosen_for_a_while_is_not_unused():
    model = mlp(depth=6)
    generator = torch.Generator().manual_seed(1)

    def layer_drop(x):
        x = model[1](model[0](x))
        for at in range(2, 12, 2):
            if torch.rand((), generator=generator) < 0.3:
                x = x + model[at + 1](model[at](x))
        return model[12](x)

    found = train(model, forward=layer_drop, steps=400)
    assert len([code for code, *_ in found if code == "module-unused"]) <= 1


def test_one_weight_of_one_value_is_told_at_the_first_step():
    model = mlp()
    nn.init.constant_(model[2].weight, 0.05)
    assert train(model)[0] == ("poor-initialisation", "warning", "2")


def test_values_that_are_alike_on_purpose_are_not():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gates = mlp(), nn.Parameter(torch.ones(2, 4))
            self.smooth = nn.Conv1d(1, 1, 3, padding=1)
            nn.init.constant_(self.smooth.weight, 1 / 3)  # one output has nothing to be a copy of
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            nn.init.constant_(self.frozen.weight, 0.1)

        def forward(self, x):
            x = self.smooth(self.inner(x)[:, None])[:, 0]
            return x * self.gates.sum(0) + self.frozen(x)

    assert train(Gated()) == []


def test_one_weight_far_above_all_others_is_told():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(100)
    assert train(model)[0] == ("poor-initialisation", "warning", "2")
    model = mlp(init=lambda w: nn.init.normal_(w, std=0.5))  # a gain of 3, all alike
    assert "poor-initialisation" not in [code for code, _, _ in train(model)]


def test_an_optimizer_that_is_never_stepped_is_told():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for _ in range(30):
            loss = model(torch.randn(16, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.step(loss=loss)
    assert [(f.code, f.severity) for f in monitor.findings] == [("parameter-unchanged", "error")]


def test_updates_by_hand_are_steps_as_well():
    model = mlp()
    with Monitor(model, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for _ in range(30):
            model.zero_grad()
            loss = model(torch.randn(16, 8)).square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)
            monitor.step(loss=loss)
    assert [str(f) for f in monitor.findings if f.severity != "info"] == []


class Residual(nn.Module):
    """Four blocks, one of which does not reach the output."""

    def __init__(self, dropped, pooler=False):
        super().__init__()
        self.dropped, self.inner, self.head = dropped, nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.pooler = nn.Linear(16, 16) if pooler else None

    def forward(self, x):
        x = self.inner(x)
        for i, block in enumerate(self.blocks):
            y = block(x)
            x = x if i == self.dropped else x + y
        if self.pooler is not None:
            self.pooler(x)
        return self.head(x)


@pytest.mark.parametrize("dropped", [0, 2, 3])
def test_a_layer_of_a_stack_whose_result_is_dropped_is_told(dropped):
    assert train(Residual(dropped)) == [("module-unused", "warning", f"blocks.{dropped}.0")]


def test_what_the_last_layer_has_no_use_for_is_an_aside():
    class Tcn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"shared": nn.Linear(16, 16), "residual": nn.Linear(16, 16), "skip": nn.Linear(16, 16)})
                for _ in range(3)
            )

        def forward(self, x):
            x, out = self.inner(x), 0.0
            for block in self.blocks:
                y = block["shared"](x).relu()
                x, out = x + block["residual"](y), out + block["skip"](y)
            return self.head(out)

    assert train(Tcn()) == [("module-unused", "info", "blocks.2.residual")]


def test_a_pooler_that_nobody_asks_is_an_aside():
    assert train(Residual(None, pooler=True)) == [("module-unused", "info", "pooler")]


def test_heads_of_which_only_one_is_used_are_an_aside():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": mlp(), "heads": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})

    def forward(x):
        x = model["body"](x)
        return [head(x) for head in model["heads"]][1]

    assert train(model, forward=forward) == [("module-unused", "info", "heads.0")]


def test_a_minimum_that_is_reached_is_no_fault():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=10)
    x = torch.randn(64, 8)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    with Monitor(model, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for _ in range(60):
            monitor.step(loss=optimizer.step(closure))
    assert "parameter-unchanged" not in [f.code for f in monitor.findings]


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_steps_of_lbfgs_may_be_wide_and_end(line_search):
    """One is up to twenty, and where it has converged, it changes nothing any more."""
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    y = x @ torch.randn(8, 1) + 1
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn=line_search)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with Monitor(model, optimizer, watches=[ParameterHealth()], every=1, strict=True) as monitor:
        for _ in range(40):
            monitor.step(loss=optimizer.step(closure))
    assert monitor.findings == []


def test_a_penalty_that_is_subtracted_makes_the_weights_longer():
    def steps(weight, make):
        model = mlp()
        optimizer = make(model.parameters())
        with Monitor(model, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
            for _ in range(300):
                x = torch.randn(16, 8)
                penalty = sum(parameter.square().sum() for parameter in model.parameters())
                loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)) + weight * penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
        return [(each.code, "longer" in each.message) for each in monitor.findings if each.severity != "info"]

    adam, sgd = (lambda p: torch.optim.Adam(p, lr=3e-3)), (lambda p: torch.optim.SGD(p, lr=0.1))
    assert steps(-0.02, adam) == [("weight-norm-drift", True)]
    assert ("weight-norm-drift", True) in steps(-0.1, sgd)
    assert steps(0.001, adam) == steps(0.001, sgd) == []


def test_weights_that_double_while_they_turn_are_well():
    records = [
        Record(name, value, step, module)
        for step in range(0, 200, 10)
        for name, value, module in (
            ("parameter/norm", 1.0 + step / 50, "a.weight"),
            ("parameter/outward", 0.6 if step < 40 else 0.2, ""),
        )
    ]
    assert replay(ParameterHealth(), records) == []


@pytest.mark.parametrize(("arrives", "told"), [(True, False), (False, True)])
def test_weights_that_began_too_small_arrive(arrives, told):
    records = [
        Record(name, value, step, module)
        for step in range(0, 300, 10)
        for name, value, module in (
            ("parameter/norm", 2.0 + (6 * (1 - 2.0 ** (-step / 30)) if arrives else 0.03 * step), "a.weight"),
            ("parameter/outward", 0.8, ""),
        )
    ]
    assert ("weight-norm-drift" in [found.code for found in replay(ParameterHealth(), records)]) is told


@pytest.mark.parametrize(("rms", "told"), [(0.02, False), (0.5, True)])
def test_a_table_that_began_small_may_grow_to_the_usual_size(rms, told):
    """Word vectors begin at a hundredth; an rms of one is what `nn.Embedding` draws."""
    norm = rms * 64  # of 4096 entries
    records = [
        Record(name, value, step, module)
        for step in range(0, 300, 10)
        for name, value, module in (
            ("parameter/norm", norm * (1 + step / 10), "table.weight"),
            ("parameter/outward", 0.6, ""),
            *([("parameter/gain", rms, "table.weight")] if step == 0 else []),
        )
    ]
    assert ("weight-norm-drift" in [found.code for found in replay(ParameterHealth(), records)]) is told


def test_a_bias_whose_gradients_cancel_belongs_to_the_layer_whose_weight_is_parametrized():
    """The last bias of a critic with a hinge loss: +1 for each made item, -1 for each real one, and rounding."""
    records = [
        Record(name, value, step, module)
        for step in (0, 50, 100)
        for name, value, module in (
            ("parameter/role", 4.0, "head.bias"),
            ("parameter/role", 4.0, "head.parametrizations.weight.original"),
            ("parameter/unchanged", 1.0, "head.bias"),
            ("parameter/unchanged", 0.0, "head.parametrizations.weight.original"),
            ("gradient/norm", 1e-9, "head.bias"),
            ("gradient/norm", 1.0, "head.parametrizations.weight.original"),
            ("parameter/norm", 1e-6, "head.bias"),
            ("parameter/norm", 2.0, "head.parametrizations.weight.original"),
        )
    ]
    assert replay(ParameterHealth(), records) == []


@pytest.mark.parametrize(("gain", "depth", "told"), [(4.0, 12, True), (4.0, 3, False), (1.5, 12, False)])
def test_gains_compound_with_depth(gain, depth, told):
    model = mlp(depth, 64, lambda w: nn.init.normal_(w, std=gain / w.shape[1] ** 0.5))
    assert ("poor-initialisation" in {code for code, *_ in train(model, steps=2)}) is told


@pytest.mark.parametrize(("deviation", "told"), [(0.02, False), (1.0, False), (5.0, False), (60.0, True)])
def test_an_embedding_far_larger_than_the_weights_is_told(deviation, told):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.normal_(model[0].weight, std=deviation)
    found = train(model, forward=lambda x: model(x[:, 0].abs().clamp(max=9).long()), steps=2)
    assert found == ([("poor-initialisation", "warning", "0")] if told else [])


def normed(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 4))


def pretrained():
    model = normed()
    train(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps=40)
    return model


def test_a_first_step_that_turns_over_what_a_checkpoint_has_learnt_is_told():
    for make, rate, told in ((pretrained, 0.1, True), (pretrained, 1e-3, False), (normed, 3e-2, False)):
        model = make()
        found = train(model, torch.optim.Adam(model.parameters(), lr=rate), steps=2)
        assert ("update-ratio-high" in {code for code, *_ in found}) is told, (make, rate)


def test_a_new_head_on_a_checkpoint_may_learn_fast():
    model = pretrained()
    model[3] = nn.Linear(32, 4)
    model[:3].requires_grad_(False)
    assert train(model, torch.optim.Adam(model[3].parameters(), lr=5e-2), steps=2) == []


def test_a_weight_that_is_written_back_is_told_although_its_bias_moves():
    model = mlp()
    held = model[2].weight.detach().clone()
    found = train(model, after=lambda _: model[2].weight.data.copy_(held))
    assert found == [("parameter-unchanged", "warning", "2")]


def test_weights_that_rest_at_a_rate_of_nothing_are_a_low_rate_and_nothing_else():
    model = mlp()
    found = train(model, torch.optim.SGD(model.parameters(), lr=2e-7))
    assert [code for code, *_ in found] == ["update-ratio-low"]


class Translator(nn.Module):
    """What the encoder returns is detached; or it is used, and a small head beside it is not."""

    def __init__(self, *, detached):
        super().__init__()
        self.detached = detached
        self.encoder, self.aside, self.decoder = mlp(depth=1, width=16), nn.Linear(4, 3, bias=False), nn.Linear(12, 4)
        self.start, self.norm = nn.Linear(8, 8), nn.LayerNorm(12)

    def forward(self, x):
        memory = self.encoder(x)
        self.aside(memory)
        memory = memory.detach() if self.detached else memory
        return self.decoder(self.norm(torch.cat([self.start(x), memory], 1)))


def test_an_encoder_whose_result_is_detached_is_told_and_an_auxiliary_head_is_an_aside():
    found = train(Translator(detached=True))
    assert [each for each in found if each[1] == "warning"] == [("module-unused", "warning", "encoder.0")]
    assert {severity for _, severity, _ in train(Translator(detached=False))} == {"info"}


def test_copies_in_float32_that_are_written_back_by_hand_are_no_forgotten_weights():
    torch.manual_seed(0)
    model = mlp().bfloat16()
    copies = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=1e-3)
    with Monitor(model, optimizer, watches=[ParameterHealth()], every=5) as monitor:
        for _ in range(100):
            loss = model(torch.randn(8, 8).bfloat16()).float().square().mean()
            model.zero_grad()
            loss.backward()
            for copy, parameter in zip(copies, model.parameters(), strict=True):
                copy.grad = parameter.grad.float()
            optimizer.step()
            with torch.no_grad():
                for copy, parameter in zip(copies, model.parameters(), strict=True):
                    parameter.copy_(copy)
            monitor.step(loss=loss.detach())
    assert [f for f in monitor.findings if f.severity != "info"] == []


@pytest.mark.parametrize(("rate", "found"), [(0.01, []), (1.0, ["update-ratio-high"])])
def test_tables_that_begin_near_zero_are_meant_to_grow(rate, found):
    torch.manual_seed(0)
    model = nn.ModuleDict({"user": nn.Embedding(50, 8), "item": nn.Embedding(60, 8)})
    for table in model.values():
        nn.init.normal_(table.weight, std=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    with Monitor(model, optimizer, watches=[ParameterHealth()], every=5) as monitor:
        for _ in range(40):
            users, items = torch.randint(50, (64,)), torch.randint(60, (64,))
            scores = (model["user"](users) * model["item"](items)).sum(-1)
            loss = nn.functional.binary_cross_entropy_with_logits(scores, ((users + items) % 2).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert [f.code for f in monitor.findings if f.severity != "info"][:1] == found


def test_a_loss_that_is_cut_off_from_the_whole_model_is_told_once_and_as_that():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for _ in range(60):
            loss = torch.tensor(model(torch.randn(8, 8)).square().mean().item(), requires_grad=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    found = monitor.findings[-1]
    assert [f.code for f in monitor.findings] == ["probe-read-nothing", "gradient-zero"]
    assert found.severity == "error"
    assert "8 parameters" in found.message
