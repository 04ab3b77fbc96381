"""Mixed precision, checkpointing, EMA and other things that trainings do: each with numbers worked out by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from stethoscope import Monitor, presets, sinks
from stethoscope.probes import Activations, Gradients, Parameters

ALL = (Activations(), Gradients(), Parameters())
FLAGS = Activations(statistics=("nonfinite",), every=1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))


def rms(x):
    return float(np.sqrt((x.detach().double().numpy() ** 2).mean()))


def values(memory, name, step=0):
    return {record.module: record.value for record in memory.records if (record.name, record.step) == (name, step)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_read_in_the_precision_that_modules_return(dtype):
    model, memory, x = net(), sinks.Memory(), torch.randn(5, 6) * 3
    with Monitor(model, probes=ALL, sinks=[memory], strict=True) as monitor:
        with torch.autocast("cpu", dtype):
            y = model(x)
        y.float().square().mean().backward()
        gradients = [each.grad.clone() for each in model.parameters()]
        monitor.step()
    assert y.dtype is dtype
    assert values(memory, "activation/rms")["2"] == pytest.approx(rms(y.float()), rel=1e-6)
    assert values(memory, "activation/max")[""] == float(y.detach().max())
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert values(memory, "gradient/norm")[name] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_a_step_that_the_gradient_scaler_skips_changes_no_weight_and_gradients_are_scaled():
    model, memory = net(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Monitor(model, optimizer, **presets.first_aid(), every=1, sinks=[memory], strict=True) as monitor:
        for factor in (1.0, 1e38):
            loss = model(torch.ones(4, 6)).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss * factor).backward()
            norm = float(torch.cat([each.grad.flatten() for each in model.parameters()]).norm())
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss=loss)
    norm_of_first = values(memory, "gradient/norm", 0)[""]
    fresh = net()
    fresh(torch.ones(4, 6)).square().mean().backward()
    unscaled = float(torch.cat([each.grad.flatten() for each in fresh.parameters()]).norm())
    assert norm_of_first == pytest.approx(1024 * unscaled, rel=1e-4)
    assert not np.isfinite(norm)
    assert set(values(memory, "parameter/unchanged", 0).values()) == {0.0}
    assert set(values(memory, "parameter/unchanged", 1).values()) == {1.0}
    assert values(memory, "gradient/nonfinite", 1)[""] > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("probe", [Activations(every=1), FLAGS])
def test_activation_checkpointing_is_read_once(reentrant, probe):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net(), nn.Linear(2, 1)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    # reentrant checkpointing wants an input that requires a gradient
    model, memory, x = Checkpointed(), sinks.Memory(), torch.randn(5, 6, requires_grad=True)
    plain = copy.deepcopy(model)
    with Monitor(model, probes=[probe, Gradients()], sinks=[memory], strict=True) as monitor:
        model(x).sum().backward()
        monitor.step()
    plain(x).sum().backward()
    assert {record.call for record in memory.records} == {0}
    if probe is not FLAGS:
        assert values(memory, "activation/rms")["body"] == pytest.approx(rms(plain.body(x)), rel=1e-6)
    norms = values(memory, "gradient/norm")
    for name, each in plain.named_parameters():
        assert norms[name] == pytest.approx(float(each.grad.norm()), rel=1e-6)


def test_accumulated_micro_batches_count_together_and_gradients_are_those_of_the_sum():
    model, memory = net(), sinks.Memory()
    batches = [torch.randn(n, 6) for n in (3, 5, 2)]
    with Monitor(model, probes=ALL, sinks=[memory], strict=True) as monitor:
        for x in batches:
            model(x).square().sum().backward()
        gradient = model[0].weight.grad.clone()
        monitor.step()
    assert values(memory, "activation/rms")[""] == pytest.approx(rms(model(torch.cat(batches))), rel=1e-6)
    assert values(memory, "gradient/norm")["0.weight"] == pytest.approx(float(gradient.norm()), rel=1e-6)


@pytest.mark.parametrize("make", [AveragedModel, copy.deepcopy], ids=["AveragedModel", "deepcopy"])
def test_an_ema_copy_made_while_observed_runs_without_being_read(make):
    model, memory, x = net(), sinks.Memory(), torch.ones(3, 6)
    with Monitor(model, probes=[Activations(every=1), FLAGS], sinks=[memory], strict=True) as monitor:
        average = make(model)
        average(torch.full((3, 6), torch.nan))
        expected = model(x)
        if make is AveragedModel:
            average.update_parameters(model)
        assert torch.equal(average(x), expected)
        monitor.step()
    assert values(memory, "activation/rms")[""] == pytest.approx(rms(expected), rel=1e-6)
    assert not values(memory, "activation/nonfinite")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch, when it loads forward mode
@pytest.mark.parametrize("probe", [Activations(every=1), FLAGS], ids=["statistics", "flags"])
def test_functional_call_is_read_and_transforms_are_left_alone(probe):
    model, memory, x = net(), sinks.Memory(), torch.randn(4, 6)
    weights = {name: each.detach() * 2 for name, each in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    plain = net()
    expected = torch.func.grad(lambda w, x: torch.func.functional_call(plain, w, (x,)).square().mean())(weights, x)
    with Monitor(model, probes=[probe, Gradients(), Parameters()], sinks=[memory], strict=True) as monitor:
        seen = torch.func.grad(loss)(weights, x)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        jacobian = torch.func.jacrev(model)(x)
        tangent = torch.func.jvp(model, (x,), (x,))
        called = torch.func.functional_call(model, weights, (x,))
        monitor.step()
    assert jacobian.shape == (4, 2, 4, 6)
    assert tangent[0].shape == (4, 2)
    for name, value in expected.items():
        assert torch.equal(seen[name], value)
        assert torch.allclose(each[name].mean(0), value, rtol=1e-4, atol=1e-6)
    if probe is not FLAGS:
        assert values(memory, "activation/rms")[""] == pytest.approx(rms(called), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("probe", [Activations(every=1), FLAGS], ids=["statistics", "flags"])
def test_tracing_an_observed_model_gives_the_same_graph_and_a_traced_part_is_told(probe):
    model, x = net(), torch.randn(3, 6)
    with Monitor(model, probes=[probe], strict=True) as monitor:
        traced = torch.jit.trace(model, x)
        expected = model(x)
        monitor.step()
    assert [node.kind() for node in traced.inlined_graph.nodes()] == [
        node.kind() for node in torch.jit.trace(net(), x).inlined_graph.nodes()
    ]
    assert torch.equal(traced(x), expected)
    whole, memory = nn.Sequential(traced, nn.Linear(2, 1)), sinks.Memory()
    with Monitor(whole, probes=[probe, Gradients(), Parameters()], sinks=[memory], strict=True) as monitor:
        whole(x).sum().backward()
        monitor.step()
    (finding,) = monitor.findings
    assert (finding.code, finding.module, finding.evidence["modules"]) == ("probe-read-nothing", "0.0", 3)
    if probe is not FLAGS:
        assert values(memory, "activation/rms")["0"] == pytest.approx(rms(expected), rel=1e-6)
    assert values(memory, "gradient/norm")["0.0.weight"] > 0


@pytest.mark.parametrize("place", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_a_model_that_moves_while_it_is_observed_is_read_where_it_is(place):
    model, memory, x = net(), sinks.Memory(), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dtype = place if isinstance(place, torch.dtype) else torch.float32
    device = place if isinstance(place, str) else "cpu"
    monitor = Monitor(model, optimizer, **presets.first_aid(), every=1, sinks=[memory])
    with monitor:
        for step in range(4):
            if step == 2:
                model.to(place)
                for state in optimizer.param_groups:
                    state["params"] = list(model.parameters())
            given = x.to(device, dtype) if step >= 2 else x
            y = model(given)
            optimizer.zero_grad()
            y.square().mean().backward()
            norms = {name: each.grad.double().norm() for name, each in model.named_parameters()}
            optimizer.step()
            if device == "cpu":
                monitor.step(loss=y.square().mean())
                assert values(memory, "activation/rms", step)[""] == pytest.approx(rms(y), rel=1e-5)
                assert values(memory, "gradient/norm", step)["0.weight"] == pytest.approx(
                    float(norms["0.weight"]), rel=1e-2 if dtype is torch.bfloat16 else 1e-5
                )
            else:
                monitor.step()
    expected = [] if device == "cpu" else ["part-disabled"]  # meta tensors have no values to send
    assert [each.code for each in monitor.findings if each.severity != "info"] == expected


def test_weight_norm_is_read_at_its_outputs_and_at_the_parameters_that_are_trained():
    model, memory, x = nn.Sequential(weight_norm(nn.Linear(6, 4)), nn.Tanh()), sinks.Memory(), torch.randn(5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, **presets.first_aid(), every=1, sinks=[memory], strict=True) as monitor:
        loss = model(x).square().mean()
        before = rms(model[0](x))
        loss.backward()
        gradient = model[0].parametrizations.weight.original1.grad.clone()
        optimizer.step()
        monitor.step(loss=loss)
    assert values(memory, "activation/rms")["0"] == pytest.approx(before, rel=1e-6)
    assert values(memory, "gradient/norm")["0.parametrizations.weight.original1"] == pytest.approx(
        float(gradient.norm()), rel=1e-5
    )
    assert "0.weight" not in values(memory, "parameter/norm")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*(quant|qconfig|observer).*:UserWarning")
def test_quantised_modules_are_read_where_they_hand_over_floats_and_the_rest_is_told():
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(6, 4), quantization.DeQuantStub())
    model.qconfig = quantization.get_default_qconfig("x86")
    memory, x = sinks.Memory(), torch.randn(5, 6)
    prepared = quantization.prepare(model.eval())
    prepared(x)
    converted = quantization.convert(prepared)
    monitor = Monitor(converted, probes=[Activations(every=1), FLAGS], sinks=[memory], strict=True)
    with monitor, monitor.phase("val"):
        y = converted(x)
    assert values(memory, "activation/rms")["2"] == pytest.approx(rms(y), rel=1e-6)
    assert {each.evidence["kind"] for each in memory.findings} == {"quantised"}


def test_fake_quantised_training_is_read_like_any_other():
    class Fake(nn.Module):
        def forward(self, x):
            return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)

    model, memory, x = nn.Sequential(nn.Linear(6, 4), Fake()), sinks.Memory(), torch.randn(5, 6)
    with Monitor(model, probes=ALL, sinks=[memory], strict=True) as monitor:
        y = model(x)
        y.sum().backward()
        monitor.step()
    assert values(memory, "activation/rms")["1"] == pytest.approx(rms(y), rel=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning", "ignore:.*is deprecated:DeprecationWarning")
def test_a_model_that_is_traced_while_it_is_observed_gives_the_code_that_it_gives_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(4, 4)
    alone = torch.jit.trace(model, x).code
    with Monitor(model, **presets.full(), every=1) as monitor:
        for _ in range(2):
            model(x).mean().backward()
            monitor.step()
            assert torch.jit.trace(model, x).code == alone  # as SummaryWriter.add_graph does
        assert not [each for each in monitor.findings if each.severity != "info"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_guard_looks_at_gradients_of_any_precision(dtype):
    model = net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, guard="skip", strict=True) as monitor:
        for step in range(3):
            before = copy.deepcopy(model.state_dict())
            x = torch.ones(4, 6, dtype=dtype)
            loss = model(x * torch.inf if step == 1 else x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step()
            same = [torch.equal(before[name], value) for name, value in model.state_dict().items()]
            assert all(same) is (step == 1)
    assert [each.severity for each in monitor.findings if each.severity != "info"] == ["error"]


def test_lazy_modules_get_their_shape_while_they_are_observed_and_guarded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.1), sinks.Memory()
    with Monitor(model, optimizer, **presets.full(), every=1, guard="skip", sinks=[memory], strict=True) as monitor:
        for step in range(4):
            before = model[1].running_mean.clone() if step else None
            loss = model(torch.randn(5, 6) * (torch.inf if step == 2 else 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            if step == 2:
                assert torch.equal(model[1].running_mean, before)
    assert set(values(memory, "parameter/norm", 3)) == {f"{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias")}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", ["by the loader", "by the model"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_left_alone_and_it_is_told(layout, nested):
    def ragged(x):
        return torch.nested.nested_tensor([x[0, :2], x[1]], layout=layout)

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = x if nested == "by the loader" else ragged(x)
            return self.out(torch.cat(self.inner(x).unbind()))

    model, memory = Ragged(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, **presets.full(), every=1, guard="skip", sinks=[memory], strict=True) as monitor:
        for _ in range(3):
            x = torch.randn(2, 4, 6)
            x = ragged(x) if nested == "by the loader" else x
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(batch=x, loss=loss)
    assert values(memory, "activation/rms", 2)["out"] > 0
    (told,) = (each for each in memory.findings if each.evidence.get("kind") == "nested")
    assert "inner" in told.evidence["modules"]


def test_layers_that_handle_nested_tensors_are_one_finding():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, memory = nn.TransformerEncoder(layer, 4), sinks.Memory()
    padding = torch.tensor([[False, False, False], [False, False, True]])
    with Monitor(model, probes=[Activations(phases=("train", "val"))], every=1, sinks=[memory]) as monitor:
        model(torch.randn(2, 3, 8), src_key_padding_mask=padding)
        monitor.step()
        model.eval()
        with monitor.phase("val"), torch.no_grad():  # packs what is not padded
            model(torch.randn(2, 3, 8), src_key_padding_mask=padding)
    (told,) = (finding for finding in memory.findings if finding.evidence.get("kind") == "nested")
    assert {f"layers.{i}" for i in range(4)} < set(told.evidence["modules"])
