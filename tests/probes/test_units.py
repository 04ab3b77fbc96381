from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, probes, sinks
from stethoscope.testing import assert_no_sync


def read(model, x, steps=3, passes=1):
    memory = sinks.Memory()
    with Monitor(model, probes=[probes.Units()], sinks=[memory], every=1, strict=True) as monitor:
        for _ in range(steps):
            for _ in range(passes):
                model(x() if callable(x) else x)
            monitor.step()
    last = max(r.step for r in memory.records)
    return {(r.name.removeprefix("unit/"), r.module): r.value for r in memory.records if r.step == last}


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_units_that_are_zero_for_every_item_are_dead_after_three_steps(kind, passes):
    layer = nn.Linear(6, 8) if kind == "linear" else nn.Conv1d(6, 8, 3, padding=1)
    with torch.no_grad():
        layer.bias[:4] -= 100
    model = nn.Sequential(layer, nn.ReLU())
    x = lambda: torch.randn((64, 6) if kind == "linear" else (16, 6, 50))  # noqa: E731
    assert read(model, x, passes=passes)["dead_fraction", "1"] == 0.5
    assert read(model, x, steps=2, passes=passes)["dead_fraction", "1"] == 0.0


def test_functional_activations_show_in_what_the_next_layer_is_given():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
            nn.init.constant_(self.a.bias[:2], -100.0)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    found = read(Net(), lambda: torch.randn(64, 6))
    assert found["input_dead_fraction", "b"] == 0.25
    assert ("input_dead_fraction", "a") not in found  # pixels that are always black are the data's business


def test_what_is_frozen_is_not_looked_at():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).requires_grad_(False)
    assert not [key for key in read(nn.Sequential(model, nn.Linear(8, 2)), torch.randn(8, 6)) if key[1].startswith("0")]


def test_the_spread_over_the_batch_is_zero_where_all_items_get_the_same():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight.zero_()
    found = read(model, torch.randn(16, 6))
    assert found["batch_spread", "1"] > 0.1
    assert found["batch_spread", "2"] == 0.0


def test_units_that_are_masked_are_constant_and_the_best_eight_are_sparse_on_purpose():
    masked, best = (nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(2))
    masked[1].register_forward_hook(lambda module, args, y: y * (torch.arange(32) >= 8))
    best[1].register_forward_hook(lambda module, args, y: y * (y.abs() >= y.abs().topk(8, -1).values[..., -1:]))
    x = torch.randn(8, 6)
    assert read(masked, x)["constant_fraction", "1"] == 0.25
    assert read(best, x)["constant_fraction", "1"] == 0.0


def test_saturation_counts_units_and_leaves_out_the_last_module():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid())
    with torch.no_grad():
        model[0].weight[:2] *= 1000
        model[2].weight *= 1000
    found = read(model, torch.randn(256, 6))
    assert found["saturated_fraction", "1"] == 0.25
    assert ("certain_fraction", "3") not in found
    assert read(nn.Sequential(*model, nn.Linear(8, 1)), torch.randn(256, 6))["certain_fraction", "3"] == 1.0


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(8), (16, 5, 8)),
        (nn.BatchNorm1d(8), (16, 8, 5)),
        (nn.GroupNorm(2, 8), (16, 8, 5)),
        (nn.InstanceNorm2d(8), (16, 8, 5, 5)),
        (nn.RMSNorm(8, eps=1e-5), (16, 5, 8)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_normalisation_is_starved_by_less_than_its_eps_and_not_by_silence(norm, shape):
    model = nn.Sequential(norm)
    assert read(model, torch.randn(shape))["starved_fraction", "0"] == 0.0
    assert read(model, 1e-4 * torch.randn(shape))["starved_fraction", "0"] == 1.0
    assert read(model, torch.zeros(shape))["starved_fraction", "0"] == 0.0


def test_a_head_whose_values_are_zero_is_dead():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    assert read(Net(), torch.randn(4, 5, 16))["dead_heads", "attention"] == 0.0
    with torch.no_grad():
        attention.in_proj_weight[32:36] = 0
    assert read(Net(), torch.randn(4, 5, 16))["dead_heads", "attention"] == 0.25


def test_heads_of_a_written_out_attention_show_in_what_the_projection_is_given():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.out_proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out_proj(y.transpose(1, 2).flatten(2))

    model = Attention()
    assert read(model, torch.randn(4, 5, 16))["dead_heads", "out_proj"] == 0.0
    with torch.no_grad():
        model.qkv.weight[32:40] = 0
        model.qkv.bias[32:40] = 0
    assert read(model, torch.randn(4, 5, 16))["dead_heads", "out_proj"] == 0.5


def test_headroom_of_float16_is_in_octaves():
    model = nn.Sequential(nn.Linear(4, 4).half())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    found = read(model, torch.full((2, 4), 16376.0, dtype=torch.half))
    assert found["headroom_bits", "0"] == pytest.approx(2.0, abs=0.01)
    assert found["floor_bits", "0"] == pytest.approx(28.0, abs=0.01)


@pytest.mark.parametrize("passes", [1, 2])
def test_it_leaves_outputs_and_random_numbers_alone(passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.2))
    x = torch.randn(4, 3, 20)
    torch.manual_seed(1)
    plain = [model(x) for _ in range(passes)]
    model[1].reset_running_stats()
    torch.manual_seed(1)
    with Monitor(model, probes=[probes.Units()], every=1, strict=True):
        assert all(torch.equal(a, model(x)) for a in plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_waits_for_the_device():
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Tanh(), nn.Flatten(), nn.Linear(144, 6), nn.Softmax(-1)
    )
    assert_no_sync(probes.Units(), nn.Sequential(model, nn.LayerNorm(6)), torch.randn(4, 3, 20))


@pytest.mark.parametrize(("function", "kind"), [(torch.tanh, "saturated"), (torch.sigmoid, "certain")])
def test_functional_activations_are_saturated_in_what_the_next_layer_is_given(function, kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.a.weight[:2] *= 1e4

        def forward(self, x):
            return self.b(function(self.a(x)))

    found = read(Net(), torch.randn(256, 6))
    assert found[f"input_{kind}_fraction", "b"] == 0.25
    assert (f"input_{kind}_fraction", "a") not in found


def test_what_only_passes_zeros_on_is_not_said_to_be_dead():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].bias[:4] -= 100
    found = read(model, torch.randn(64, 6))
    assert {module for name, module in found if name == "dead_fraction"} == {"0", "1", "4"}
    assert found["dead_fraction", "1"] == 0.5


@pytest.mark.parametrize("within", [False, True])
def test_a_model_that_moves_to_another_device_is_read_there(within):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1))
    attached = probes.Units().attach(model)
    attached.arm(on=True, phase="train")
    model(torch.randn(4, 6))
    if not within:
        assert {tensor.device.type for tensor in attached.read({}).values()} == {"cpu"}
        attached.arm(on=True, phase="train")
    model.to("meta")(torch.randn(4, 6, device="meta"))
    assert {tensor.device.type for tensor in attached.read({}).values()} == {"meta"}
    attached.detach()


def test_dropout_of_half_and_more_is_recorded_where_it_drops():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 8), nn.Dropout(0.9))
    found = read(model, lambda: torch.randn(64, 6))
    assert found["dropped_fraction", "3"] == pytest.approx(0.9)
    assert ("dropped_fraction", "1") not in found
