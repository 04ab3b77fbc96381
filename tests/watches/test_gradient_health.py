from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.testing import replay
from stethoscope.watches import GradientHealth


def mlp(activation=nn.ReLU, depth=3, width=32):
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else 8, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def train(model, *, forward=None, zero=True, clip=None, optimizer=None, steps=60, every=5, after=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    with Monitor(model, optimizer, watches=[GradientHealth()], every=every, strict=True) as monitor:
        for step in range(steps):
            x = torch.randn(16, 8, generator=generator)
            loss = nn.functional.cross_entropy((forward or model)(x), x[:, :4].argmax(1))
            if zero:
                optimizer.zero_grad()
            loss.backward()
            if after:
                after(step)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            monitor.step(loss=loss)
    return [(f.code, f.severity, f.module) for f in monitor.findings]


def test_twelve_sigmoid_layers_vanish_and_three_do_not():
    assert train(mlp(nn.Sigmoid, 12)) == [("gradient-vanishing", "warning", "0")]
    assert train(mlp(nn.Sigmoid, 3)) == []


def test_weights_that_are_moved_by_hand_are_not_told_to_have_no_gradient():
    model, by_hand = mlp(), type("ByHand", (), {"param_groups": [{"lr": 0.01}]})()
    by_hand.zero_grad = model.zero_grad

    @torch.no_grad()
    def step():
        for each in model.parameters():
            each.sub_(each.grad, alpha=0.01)

    by_hand.step = step
    assert train(model, optimizer=by_hand) == []


def test_gradients_that_grow_on_their_way_back_explode_over_depth():
    model = mlp(depth=8)

    def forward(x):
        middle = model[:8](x)
        middle.register_hook(lambda gradient: 1e8 * gradient)
        return model[8:](middle)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    assert train(model, forward=forward, optimizer=optimizer) == [("gradient-exploding", "warning", "0")]


def test_a_part_that_is_cut_off_is_named_at_the_cut():
    model = mlp(depth=3)
    cut = train(model, forward=lambda x: model[4:](model[:4](x).detach()))
    assert cut == [("gradient-zero", "warning", "2")]
    model = mlp(depth=3)
    assert train(model, forward=lambda x: model[4:](0.0 * model[:4](x) + 1)) == [("gradient-zero", "warning", "2")]


def test_an_expert_that_is_never_chosen_is_an_info():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = self.inner(x)
            return self.head(x + sum((i != 2) * expert(x) for i, expert in enumerate(self.experts)))

    torch.manual_seed(0)
    assert train(Mixture()) == [("gradient-zero", "info", "experts.2")]


def test_gradients_that_are_never_zeroed():
    assert train(mlp(), zero=False)[0] == ("gradient-accumulation", "warning", "")
    assert train(mlp(), zero=False, clip=0.1)[0] == ("gradient-accumulation", "warning", "")


def test_clipping_to_a_thousandth_is_reported_and_clipping_to_half_is_not():
    assert train(mlp(), clip=1e-3) == [("gradient-clipping", "warning", "")]
    assert train(mlp(), clip=0.5) == []


def test_a_gradient_that_becomes_nan_is_named_before_the_weights_are_looked_at():
    model = mlp()

    def spoil(step):
        if step == 19:
            model[2].weight.register_hook(lambda g: g * torch.nan)

    assert train(model, after=spoil)[0] == ("nonfinite-gradient", "error", "2")


def test_an_optimizer_that_skips_a_gradient_of_infinity_is_how_mixed_precision_works():
    step = [Record("gradient/norm", v, 5, m) for m, v in (("a.weight", float("inf")), ("", float("inf")))]
    assert replay(GradientHealth(), [*step, Record("optimizer/steps", 0.0, 5)]) == []
    assert [f.code for f in replay(GradientHealth(), [*step, Record("optimizer/steps", 1.0, 5)])] == [
        "nonfinite-gradient"
    ]


@pytest.mark.parametrize("saved_by", ["guard", "hand"])
def test_a_gradient_of_nan_that_is_gone_before_the_write_has_lost_nothing(saved_by):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = "skip" if saved_by == "guard" else None
    with Monitor(model, optimizer, watches=[GradientHealth()], every=5, guard=guard, strict=True) as monitor:
        for step in range(30):
            loss = model(torch.ones(4, 8)).square().mean() * (torch.nan if step in (10, 15) else 1.0)
            optimizer.zero_grad()
            loss.backward()
            if saved_by == "hand":
                for each in model.parameters():
                    each.grad.nan_to_num_(0.0)
            optimizer.step()
            monitor.step(loss=loss)
    assert all(each.isfinite().all() for each in model.parameters())
    assert not [f for f in monitor.findings if "the optimizer has written" in f.message]


def test_one_layer_far_above_the_others():
    model = mlp(depth=6)
    model[4].weight.register_hook(lambda g: 1e6 * g)
    assert train(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-4)) == [
        ("gradient-imbalance", "warning", "4")
    ]


def test_growth_over_time_must_last():
    def norms(*totals):
        return [
            Record(name, value, 10 * i, module)
            for i, total in enumerate(totals)
            for name, value, module in (
                ("gradient/norm", total, "a.weight"),
                ("gradient/norm", total, ""),
                ("parameter/norm", 1.0, "a.weight"),
            )
        ]

    assert replay(GradientHealth(), norms(1, 1, 1, 500, 1, 1, 500, 1)) == []
    found = replay(GradientHealth(), norms(1, 1, 1, 500, 700, 900))
    assert [(f.code, f.step) for f in found] == [("gradient-exploding", 40)]
    # large, but as it has always been: a loss in large units
    assert replay(GradientHealth(), norms(500, 600, 500, 700)) == []


def test_a_loss_that_comes_down_to_zero_has_no_gradient_and_one_that_begins_there_teaches_nothing():
    def run(first, loss=0.0):
        for i in range(5):
            yield (
                Record("loss", loss if i else 1.0, i * 10, source="step")
                if first
                else Record("loss", loss, i * 10, source="step")
            )
            yield Record("gradient/norm", first if not i else 0.0, i * 10, "a.b")

    told = [("gradient-zero", "error")]
    assert replay(GradientHealth(), list(run(1.0))) == []
    assert [(f.code, f.severity) for f in replay(GradientHealth(), list(run(0.0)))] == told
    assert [(f.code, f.severity) for f in replay(GradientHealth(), list(run(1.0, loss=0.5)))] == told


def test_ctc_whose_inputs_are_all_too_short_for_their_texts():
    def run(length):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        ctc = nn.CTCLoss(zero_infinity=True)
        with Monitor(model, optimizer, watches=[GradientHealth()], every=5, strict=True) as monitor:
            for _ in range(30):
                scores = model(torch.randn(length, 4, 8)).log_softmax(-1)
                sizes = torch.full((4,), length), torch.full((4,), 6)
                loss = ctc(scores, torch.randint(1, 5, (4, 6)), *sizes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
        return [(f.code, f.severity) for f in monitor.findings]

    assert run(4) == [("gradient-zero", "error")]
    assert run(20) == []


@pytest.mark.parametrize("every", [5, 25])
@pytest.mark.parametrize(
    ("bad", "told"), [(range(100), True), (range(30, 100), True), (range(12), False), (range(0, 100, 5), False)]
)
def test_a_scaler_that_skips_each_step_is_told_and_one_that_looks_for_its_scale_is_not(bad, told, every):
    torch.manual_seed(0)
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu")
    with Monitor(model, optimizer, watches=[GradientHealth()], every=every, strict=True) as monitor:
        for step in range(100):
            x = torch.randn(16, 8)
            loss = model(x).square().mean() + (model[0].weight.sum() * (torch.inf if step in bad else 0.0))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
    assert [(f.code, f.severity, f.module) for f in monitor.findings] == (
        [("step-skipped", "warning", "0")] if told else []
    )


def scaled(model, clip, *, unscale, steps=60):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    with Monitor(model, optimizer, watches=[GradientHealth()], every=5, strict=True) as monitor:
        for _ in range(steps):
            x = torch.randn(16, 8)
            loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss=loss)
    return [f.code for f in monitor.findings]


def test_clipping_shows_under_a_scaler_also_where_scaled_gradients_are_clipped():
    assert scaled(mlp(), 1.0, unscale=True) == []
    assert scaled(mlp(), 1e-4, unscale=True) == ["gradient-clipping"]
    assert scaled(mlp(), 1.0, unscale=False) == ["gradient-clipping"]


@pytest.mark.parametrize(("role", "said"), [(1.0, []), (4.0, ["gradient-imbalance"])])
def test_gradients_that_no_optimizer_holds_add_up_and_do_not_count(role, said):
    norms = {"a.w": 1e-4, "b.w": 1e-4, "c.w": 1e-4, "d.w": 1e-4, "head.w": 30.0}  # zero_grad() leaves those of the head
    stream = [
        record
        for step in (0, 50, 100, 150)
        for name in reversed(norms)  # as they arrive
        for record in (
            Record("gradient/norm", norms[name], step, name),
            Record("parameter/norm", 1.0, step, name),
            Record("parameter/role", role if name == "head.w" else 4.0, step, name),
        )
    ]
    assert [f.code for f in replay(GradientHealth(), stream)] == said


NAMES = [
    "gradient/norm",
    "gradient/nonfinite",
    "gradient/applied_norm",
    "gradient/scale",
    "gradient/carried",
    "parameter/norm",
    "parameter/role",
]
anything = st.builds(
    Record,
    st.sampled_from([*NAMES, "optimizer/steps", "optimizer/total", "activation/rms"]),
    st.floats(),
    st.integers(0, 5),
    st.sampled_from(["", "a.w", "b.w", "c.w", "d.w", "e.w"]),
)


@given(st.lists(anything, max_size=60))
def test_whatever_comes_in_the_state_is_json(records):
    watch = GradientHealth(steps=0, observations=1)
    state = watch.init()
    for record in sorted(records, key=lambda r: r.step):
        state, _ = watch.update(state, [record])
    state, found = watch.update(state, records)
    json.dumps(state, allow_nan=False)
    json.dumps([dict(f.evidence) for f in found])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_healthy_training_is_silent(make):
    model = mlp()
    assert train(model, optimizer=make(model.parameters(), lr=1e-3), steps=100, clip=1.0) == []


class Residual(nn.Module):
    """Blocks one after the other; the result of one is multiplied by `factor`."""

    def __init__(self, at, factor=0.0):
        super().__init__()
        self.at, self.factor = at, factor
        self.inner, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.scale = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        x = self.inner(x)
        for i, block in enumerate(self.blocks):
            x = x + (self.scale[i] if self.at is None else self.factor if i == self.at else 1.0) * block(x)
        return self.head(x)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_block_that_is_multiplied_by_zero_is_no_expert_at_rest(at):
    torch.manual_seed(0)
    assert ("gradient-zero", "warning", f"blocks.{at}.0") in train(Residual(at))


def test_branches_that_begin_at_zero_are_fine():
    torch.manual_seed(0)
    assert [each for each in train(Residual(None), optimizer=None) if each[1] != "info"] == []


@pytest.mark.parametrize("to_none", [False, True])
def test_gradients_that_are_zeroed_between_backward_and_step_are_told_once(to_none):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = train(model, optimizer=optimizer, after=lambda _: optimizer.zero_grad(set_to_none=to_none))
    assert found == [("gradient-zero", "error", "")]


@pytest.mark.parametrize("to_none", [False, True])
def test_an_optimizer_that_throws_gradients_away_after_their_use_is_fine(to_none):
    class Thrifty(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad(set_to_none=to_none)

    model = mlp()
    assert train(model, optimizer=Thrifty(model.parameters(), lr=0.01)) == []


def test_one_module_far_above_others_that_are_well_is_imbalance_and_no_trend():
    model = mlp(depth=5)
    last = model[-1].weight
    last.register_hook(lambda gradient: 1e6 * gradient)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    assert train(model, optimizer=optimizer) == [("gradient-imbalance", "warning", "10")]


def test_gradients_of_a_model_that_no_optimizer_holds_are_not_zero():
    model = mlp()
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    assert [each for each in train(model, optimizer=optimizer) if each[0] == "gradient-zero"] == []


class Gated(nn.Module):
    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.gate, self.update, self.head = (
            nn.Linear(8, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 4),
        )
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x):
        x = self.inner(x).tanh()
        gate = self.gate(x).sigmoid()
        return self.head(gate * self.update(x) + (1 - gate) * x)


@pytest.mark.parametrize(("bias", "told"), [(-30.0, ["gate", "update"]), (-3.0, []), (0.0, [])])
def test_a_gate_that_is_shut_is_told_by_the_gradients_that_do_not_pass_it(bias, told):
    found = [each for each in train(Gated(bias)) if each[0] == "gradient-vanishing"]
    assert found == [("gradient-vanishing", "warning", told[0])] if told else not found


def test_branches_behind_a_scale_that_begins_at_a_millionth_are_fine():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.head = mlp(depth=1), nn.Linear(4, 4)
            self.branch, self.scale = mlp(depth=2), nn.Parameter(torch.full((4,), 1e-6))

        def forward(self, x):
            return self.head(self.start(x) + self.scale * self.branch(x))

    torch.manual_seed(0)
    model = Scaled()
    assert train(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3)) == []


@pytest.mark.parametrize(("make", "severity"), [(torch.optim.Adam, "info"), (torch.optim.SGD, "warning")])
def test_steps_of_adam_are_as_long_however_hard_all_gradients_are_clipped(make, severity):
    model = mlp()
    found = train(model, optimizer=make(model.parameters(), lr=1e-3), clip=1e-3)
    assert ("gradient-clipping", severity, "") in found
