from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.testing import replay
from stethoscope.watches import ActivationHealth


def mlp(activation=nn.ReLU, depth=3, norm=None, width=32):
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else 8, width), *([norm(width)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def train(model, *, optimizer=None, forward=None, steps=60, every=5, scale=1.0, after=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    with Monitor(model, optimizer, watches=[ActivationHealth()], every=every, strict=True) as monitor:
        for step in range(steps):
            x = torch.randn(16, 8, generator=generator)
            loss = nn.functional.cross_entropy((forward or model)(scale * x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if after:
                after(step)
            monitor.step(loss=loss)
    return [(f.code, f.module) for f in monitor.findings]


def scaled(model, factor, *layers):
    with torch.no_grad():
        for i in layers:
            model[i].weight.mul_(factor)
    return model


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm, nn.BatchNorm1d])
def test_healthy_networks_are_silent(activation, norm):
    assert train(mlp(activation, norm=norm)) == []


@pytest.mark.parametrize("scale", [1e-4, 3e4])
def test_inputs_of_any_unit_are_fine_where_the_network_normalises_them(scale):
    model = nn.Sequential(nn.BatchNorm1d(8, eps=1e-12), *mlp())
    assert train(model, scale=scale) == []


def test_dead_relus_are_told_and_a_third_of_them_is_not():
    model = mlp()
    nn.init.constant_(model[2].bias, -50.0)
    assert train(model)[0] == ("dead-units", "3")
    model = mlp()
    nn.init.constant_(model[2].bias[:10], -50.0)
    assert train(model) == []


def test_tanh_with_weights_too_large_is_saturated():
    assert ("activation-saturated", "1") in train(scaled(mlp(nn.Tanh), 100, 0))


def test_a_sigmoid_is_saturated_from_the_start_or_certain_later():
    gate = lambda: nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), nn.Linear(32, 4))  # noqa: E731
    torch.manual_seed(0)
    assert train(scaled(gate(), 1000, 0)) == [("activation-saturated", "1")]
    torch.manual_seed(0)
    model = gate()
    assert train(model, after=lambda step: scaled(model, 1000, 0) if step == 30 else None) == []


def test_a_representation_that_is_the_same_for_all_items_is_told_where_it_begins():
    model = mlp(nn.Tanh)
    found = train(model, forward=lambda x: model[2:](model[:2](x).mean(0, keepdim=True).expand(16, -1)))
    assert found == [("feature-constant", "2")]


def test_a_mask_that_was_left_over():
    model = mlp(nn.Tanh)
    model[1].register_forward_hook(lambda module, args, output: output * (torch.arange(32) >= 8))
    assert train(model) == [("feature-constant", "1")]


def test_queries_that_are_the_same_for_all_items_on_their_way_are_fine():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.queries = nn.Parameter(torch.randn(5, 16))

        def forward(self, x):
            queries = self.first(self.queries.expand(len(x), -1, -1))
            return self.head((queries * self.inner(x)[:, None]).mean(1))

    assert train(Queries()) == []


def test_signals_that_vanish_and_explode():
    small = scaled(mlp(nn.Tanh, depth=6), 0.02, *range(0, 12, 2))
    with torch.no_grad():
        for layer in small:
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
    codes = [code for code, _ in train(small, optimizer=torch.optim.SGD(small.parameters(), lr=1e-4))]
    assert "activation-vanishing" in codes
    large = scaled(mlp(nn.ReLU, depth=6), 40, *range(0, 12, 2))
    assert "activation-exploding" in [
        code for code, _ in train(large, optimizer=torch.optim.SGD(large.parameters(), lr=0.0))
    ]


def test_growth_over_time_must_last():
    def levels(*values):
        return [
            Record(name, value, 10 * i, module)
            for i, level in enumerate(values)
            for name, value, module in (
                ("activation/input_rms", 1.0, "a"),
                ("activation/rms", level, "a"),
                ("activation/rms", 5.0, "b"),
            )
        ]

    assert replay(ActivationHealth(), levels(1, 1, 1, 5000, 1, 1)) == []
    assert [f.code for f in replay(ActivationHealth(), levels(1, 1, 1, 5000, 6000))] == ["activation-exploding"]


class Parts(nn.Module):
    """One module in the middle of two layers."""

    def __init__(self, middle, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.middle, self.norm, self.head = nn.Linear(8, 16), middle, nn.LayerNorm(16), nn.Linear(16, 4)
        self.scale = scale

    def forward(self, x):
        x = self.middle(self.scale * self.inner(x))
        return self.head(self.norm(x[0] if isinstance(x, tuple) else x))


class Scale(nn.Module):
    def forward(self, x):
        return 1e6 * x


class Steps(nn.Module):
    """A recurrent network over 40 copies of its input, the first of the states of the batch last."""

    def __init__(self, gain):
        super().__init__()
        self.rnn = nn.RNN(16, 16, nonlinearity="relu", batch_first=True)
        nn.init.eye_(self.rnn.weight_hh_l0)
        with torch.no_grad():
            self.rnn.weight_hh_l0.mul_(gain)

    def forward(self, x):
        return self.rnn(x[:, None].expand(-1, 40, -1))[0][:, -1]


def test_a_gain_above_one_over_time_explodes_from_the_start_on():
    lazy = lambda model: torch.optim.SGD(model.parameters(), lr=1e-6)  # noqa: E731
    model = Parts(Steps(1.3))
    assert ("activation-exploding", "middle.rnn") in train(model, optimizer=lazy(model))
    model = Parts(Steps(0.9))
    assert train(model, optimizer=lazy(model)) == []


@pytest.mark.parametrize("middle", [Scale(), nn.LayerNorm(16), nn.BatchNorm1d(16)])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_what_is_meant_to_be_large_or_is_given_next_to_nothing_does_not_explode(middle, scale):
    middle = copy.deepcopy(middle)
    found = train(Parts(middle, scale if not isinstance(middle, Scale) else 1e-3), steps=30)
    assert "activation-exploding" not in [code for code, _ in found]


def test_an_embedding_does_not_explode():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 4))
    nn.init.normal_(model[0].weight, std=1000.0)
    found = train(model, forward=lambda x: model((10 * x[:, :3].sigmoid()).long()), steps=30)
    assert "activation-exploding" not in [code for code, _ in found]


def test_a_normalisation_of_next_to_nothing():
    model = mlp(norm=nn.LayerNorm)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("0.")], lr=0.01)
    scaled(model, 1e-4, 0)
    nn.init.zeros_(model[0].bias)
    assert train(model, optimizer=optimizer)[0] == ("norm-input-variance", "1")


def test_float16_close_to_its_end():
    near = [Record("unit/headroom_bits", 1.0, step, "a") for step in (0, 10, 20)]
    assert [f.code for f in replay(ActivationHealth(), near)] == ["dtype-headroom"]
    far = [Record("unit/headroom_bits", 6.0, step, "a") for step in (0, 10, 20)]
    assert replay(ActivationHealth(), far) == []


def test_many_layers_make_one_finding():
    dead = [Record("unit/dead_fraction", 1.0, step, f"layer{i}") for step in (0, 10, 20) for i in range(150)]
    (finding,) = replay(ActivationHealth(), dead)
    assert finding.module == "layer0"
    assert finding.evidence["count"] == 150
    assert len(finding.evidence["modules"]) == 100


NAMES = [
    "dead_fraction",
    "saturated_fraction",
    "certain_fraction",
    "batch_spread",
    "constant_fraction",
    "headroom_bits",
    "floor_bits",
]
anything = st.builds(
    Record,
    st.sampled_from([f"unit/{n}" for n in NAMES] + ["activation/rms", "activation/input_rms"]),
    st.floats(),
    st.integers(0, 5),
    st.sampled_from(["", "a", "a.b", "c", "d"]),
)


@given(st.lists(anything, max_size=60))
def test_whatever_comes_in_the_state_is_json(records):
    watch = ActivationHealth(steps=0, observations=1)
    state = watch.init()
    for record in sorted(records, key=lambda r: r.step):
        state, _ = watch.update(state, [record])
    state, _ = watch.update(state, records)
    json.dumps(state, allow_nan=False)


def test_a_functional_tanh_with_weights_too_large_is_saturated():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model = Net()
    assert train(model) == []
    with torch.no_grad():
        model.b.weight.mul_(300)
    assert train(model)[0] == ("activation-saturated", "c")


@pytest.mark.parametrize(("rms", "told"), [(4e4, [0]), (4e3, [10])])
def test_ten_thousand_times_the_input_is_told_at_the_first_look(rms, told):
    records = []
    for step in (0, 10):
        for module in ("rnn", "head"):
            size = rms if module == "rnn" else 1.0
            records += [
                Record("activation/input_rms", 0.7, step, module),
                Record("activation/rms", size, step, module),
                Record("parameter/norm", 1.0, step, f"{module}.weight"),
            ]
    found = [f for f in replay(ActivationHealth(), records) if f.code == "activation-exploding"]
    assert [(f.step, f.module) for f in found] == [(step, "rnn") for step in told]


@pytest.mark.parametrize(
    ("p", "told"), [(0.5, []), (0.8, []), (0.95, [("dropout-high", "2")]), (1.0, [("dropout-high", "2")])]
)
def test_a_dropout_that_drops_nearly_all_is_told_at_the_first_look(p, told):
    model = mlp(depth=1)
    model.insert(2, nn.Dropout(p))
    assert [found for found in train(model, steps=6) if found[0] == "dropout-high"] == told


def test_a_dropout_that_is_in_eval_mode_drops_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(depth=1)
            self.body.insert(2, nn.Dropout(0.95))

        def forward(self, x):
            self.body[2].eval()
            return self.body(x)

    assert train(Net(), steps=6) == []


def test_an_rms_of_infinity_says_nothing_of_a_scale():
    records = [
        Record(name, value, step, module)
        for step in (0, 10, 20, 30)
        for name, value, module in (
            ("activation/input_rms", 1.0, "a"),
            ("activation/rms", float("inf") if step > 20 else 1.0, "a"),
            ("activation/input_rms", 1.0, "b"),
            ("activation/rms", 1.0, "b"),
            ("parameter/norm", 1.0, "a.weight"),
        )
    ]
    assert replay(ActivationHealth(), records) == []
