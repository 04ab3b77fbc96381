"""What need not be read to be known: activation functions and dropouts behind values that were read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from stethoscope import Monitor, probes
from stethoscope.sinks import Memory

WIDTH = 80  # 64 x 80 values: too many to be put off


class Plants(nn.Module):
    """Hands on what it is given, with one value of another kind if asked to."""

    def __init__(self, value: float | None = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        x = x * 1.5
        if self.value is not None:
            x[3, 5] = self.value
        return x


def flagged(model: nn.Module, x: torch.Tensor, name: str = "activation/nonfinite") -> set[str]:
    """Modules with this flag, by a probe that reads flags alone."""
    memory = Memory()
    probe = probes.Activations(statistics=("nonfinite",))
    with Monitor(model, probes=[probe], sinks=[memory], every=1, strict=True) as monitor:
        for _ in range(2):
            model(x.requires_grad_()).sum().backward()
            monitor.step()
    return {r.module for r in memory.records if r.name == name and r.value}


def truth(model: nn.Module, x: torch.Tensor) -> set[str]:
    bad = set()

    def look(name, output):
        if not output.isfinite().all():
            bad.add(name)

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return bad


PARTS = [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.PReLU, nn.Softplus, nn.Flatten, nn.Dropout, nn.Identity, nn.Sigmoid]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([Plants, *PARTS, lambda: nn.LayerNorm(WIDTH)]), min_size=2, max_size=8),
    st.integers(0, 7),
    st.sampled_from([None, math.nan]),
)
def test_a_nan_is_told_of_just_the_modules_that_return_it(parts, place, value):
    layers = [part() for part in parts]
    layers.insert(min(place, len(layers)), Plants(value))
    model = nn.Sequential(*layers)
    x = torch.randn(64, WIDTH)
    assert flagged(model, x) == truth(model, x)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_an_infinity_is_told_of_the_module_that_made_it_and_of_all_that_pass_it_on(part, value):
    model = nn.Sequential(Plants(), Plants(value), part(), Plants())
    x = torch.randn(64, WIDTH)
    assert truth(model, x) <= flagged(model, x) <= {"", "1", "2", "3"}
    assert ("3" in flagged(model, x)) == ("3" in truth(model, x))


class Healed(nn.Module):
    """Rectifies a logarithm of zero: healthy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.rectify, self.more = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.more(self.rectify((self.linear(x) * torch.zeros(WIDTH)).abs().log()))


def test_an_infinity_that_no_module_returned_and_a_relu_removes_is_not_passed_on():
    assert flagged(Healed(), torch.randn(64, WIDTH)) == set()


class Functional(nn.Module):
    """An activation function that is no module, and in between whatever is asked for."""

    def __init__(self, between=lambda x: x) -> None:
        super().__init__()
        self.linear, self.dropout, self.more = nn.Linear(WIDTH, WIDTH), nn.Dropout(), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x):
        return self.more(self.dropout(self.between(torch.relu(self.linear(x)))))


def test_what_is_done_behind_an_activation_function_is_seen():
    def plant(x):
        x = x.clone()
        x[2, 2] = math.nan
        return x

    seen = flagged(Functional(plant), torch.randn(64, WIDTH), "activation/input_nonfinite")
    assert "dropout" in seen
    assert flagged(Functional(plant), torch.randn(64, WIDTH)) >= {"dropout", "more"}


def test_what_is_written_into_the_result_of_an_activation_function_is_seen():
    class Writes(Functional):
        def forward(self, x):
            x = torch.nn.functional.gelu(self.linear(x))  # whose backward pass does not need the result
            with torch.no_grad():
                x[2, 2] = math.nan
            return self.more(self.dropout(x))

    assert flagged(Writes(), torch.randn(64, WIDTH)) == {"", "dropout", "more"}


def test_what_a_model_returns_is_read_although_an_activation_function_made_it():
    class Log(nn.Module):
        def forward(self, x):
            return -(x * 0).abs().log()

    class Gate(nn.Sequential):
        def forward(self, x):
            return torch.sigmoid(super().forward(x))

    model = Gate(nn.Linear(WIDTH, WIDTH), Log())
    assert flagged(model, torch.randn(64, WIDTH)) == {"1"}
    assert flagged(model, torch.randn(64, WIDTH), "activation/outermost_nonfinite") == set()


ODD = [
    (nn.ELU(math.nan), "elu"),
    (nn.LeakyReLU(math.inf), "leaky_relu"),
    (nn.Softplus(0.0), "softplus"),
    (nn.CELU(math.nan), "celu"),
]


@pytest.mark.parametrize(("part", "name"), ODD, ids=[name for _, name in ODD])
def test_an_activation_function_with_an_impossible_factor_is_read(part, name):
    x = torch.randn(64, WIDTH)
    function, given = (
        getattr(torch.nn.functional, name),
        next(value for value in vars(part).values() if type(value) is float),
    )
    assert flagged(nn.Sequential(nn.Linear(WIDTH, WIDTH), part, nn.Linear(WIDTH, WIDTH)), x) == {"", "1", "2"}

    class Calls(Functional):
        def forward(self, x):
            return self.more(self.dropout(function(self.linear(x), given)))

    assert flagged(Calls(), x) == {"", "dropout", "more"}


def test_a_tensor_that_is_not_read_leaves_the_flags_of_the_last_one_where_they_are():
    class Lengths(nn.Module):
        def forward(self, lengths):
            return lengths

    class Ragged(Functional):
        def __init__(self):
            super().__init__()
            self.lengths = Lengths()

        def forward(self, x):
            x = self.linear(x)
            self.lengths(torch.arange(5, device="meta"))  # as where the activations are on a GPU, the lengths not
            return self.more(self.dropout(x))

    model = Ragged()
    assert flagged(model, torch.randn(64, WIDTH)) == set()
    with torch.no_grad():
        model.linear.bias[3] = math.nan
    assert flagged(model, torch.randn(64, WIDTH)) == {"", "linear", "dropout", "more"}


class Halves(nn.Module):
    """Returns two results of one operation, the first of which has a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)
        with torch.no_grad():
            self.linear.bias[3] = math.nan

    def forward(self, x):
        return self.linear(x).split(WIDTH, dim=-1)


class Crossed(nn.Module):
    """Takes the first result, where the second was read last."""

    def __init__(self) -> None:
        super().__init__()
        self.halves, self.dropout = Halves(), nn.Dropout()

    def forward(self, x):
        first, second = self.halves(x)
        return self.dropout(torch.relu(first)) + second


def test_results_of_one_operation_are_told_apart():
    assert flagged(Crossed(), torch.randn(64, WIDTH)) == {"", "halves", "halves.linear", "dropout"}


def test_what_is_written_into_an_activation_is_seen():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Dropout(), nn.Linear(WIDTH, WIDTH))

    def write(module, args):
        with torch.no_grad():
            args[0][2, 2] = math.nan

    model[2].register_forward_pre_hook(write)
    assert flagged(model, torch.randn(64, WIDTH)) >= {"2", "3"}


def test_a_weight_of_prelu_that_is_nan_makes_prelu_the_producer():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.PReLU(WIDTH), nn.LayerNorm(WIDTH))
    with torch.no_grad():
        model[1].weight[3] = math.nan
    assert flagged(model, torch.randn(64, WIDTH)) >= {"1", "2"}
    assert "0" not in flagged(model, torch.randn(64, WIDTH))


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_users_hook_makes_of_an_activation_is_read(everywhere):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(), nn.Linear(WIDTH, WIDTH))

    def hook(module, args, output):
        return output / 0 if module is model[1] else None

    handle = register_module_forward_hook(hook) if everywhere else model[1].register_forward_hook(hook)
    try:
        assert flagged(model, torch.randn(64, WIDTH)) >= {"1", "2"}
    finally:
        handle.remove()


def test_a_dropout_that_leaves_the_range_of_float16_is_told():
    model = nn.Sequential(Plants(40_000.0), nn.Dropout(0.5))
    torch.manual_seed(0)
    seen = [flagged(model, torch.randn(64, WIDTH, dtype=torch.float16)) for _ in range(4)]
    assert {"", "1"} in seen  # where the value is not dropped
    assert all("0" not in each for each in seen)


def test_inference_mode_in_validation_is_no_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout())
    probe = probes.Activations(statistics=("nonfinite",))
    with Monitor(model, probes=[probe], every=1, strict=True) as monitor:
        for _ in range(3):
            with monitor.phase("val"), torch.inference_mode():
                model(torch.randn(64, WIDTH))
            model(torch.randn(64, WIDTH)).sum().backward()
            monitor.step()
    assert monitor.findings == []


class Sums(TorchDispatchMode):
    """Counts the reductions of whole tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.sum.IntList_out
        return func(*args, **(kwargs or {}))


def test_half_of_what_a_feed_forward_part_passes_on_is_not_read():
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout()] * 4)
    probe = probes.Activations(statistics=("nonfinite",))
    x = torch.randn(64, WIDTH)
    with Monitor(model, probes=[probe], every=1, strict=True) as monitor:
        model(x).sum().backward()
        monitor.step()
        with Sums() as sums:
            model(x)
        assert sums.count == 1 + 4 + 1  # the input, what each Linear returns, and what the model does
