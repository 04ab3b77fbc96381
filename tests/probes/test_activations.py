from __future__ import annotations

import copy
import itertools
import pickle
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from stethoscope import Monitor, sinks
from stethoscope.probes import Activations, Inputs, Parameters
from stethoscope.sinks import Memory

ALL = (
    "mean",
    "rms",
    "min",
    "max",
    "absmax",
    "zero_fraction",
    "nonfinite",
    "histogram",
    "std",
    "kurtosis",
    "nonfinite_count",
)
both_paths = pytest.mark.parametrize("statistics", [("nonfinite",), ALL])


def observe(model, *passes, probe=None):
    """Run the model on each of the passes as micro-batches of one step; return values by name, module and call."""
    memory = sinks.Memory()
    with Monitor(model, probes=[probe or Activations(ALL)], sinks=[memory], strict=True) as monitor:
        for arguments in passes:
            model(*arguments)
        monitor.step()
    return {(record.name, record.module, record.call): record.value for record in memory.records}


def reference(values: np.ndarray) -> dict[str, float]:
    """The same statistics in float64 NumPy."""
    x = (np.abs(values) if np.iscomplexobj(values) else values).astype(np.float64)
    with np.errstate(all="ignore"):
        deviation = x - x.mean()
        return {
            "mean": x.mean(),
            "rms": np.sqrt((x**2).mean()),
            "min": x.min(),
            "max": x.max(),
            "absmax": np.abs(x).max(),
            "zero_fraction": (x == 0).mean(),
            "std": np.sqrt((deviation**2).mean()),
            "kurtosis": (deviation**4).mean() / (deviation**2).mean() ** 2,
            "nonfinite_count": float((~np.isfinite(x)).sum()),
        }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "int8", "int64", "bool"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_statistics_equal_a_float64_reference(dtype, data):
    shape = data.draw(array_shapes(max_dims=4, max_side=6))
    if dtype in ("int8", "int64"):
        number = st.integers(-100, 100)
    elif dtype == "bool":
        number = st.booleans()
    elif data.draw(st.booleans()):
        number = st.floats(-1e30, 1e30) if dtype != "float16" else st.floats(-6e4, 6e4)
    else:
        number = st.floats()
    values = data.draw(arrays(np.float64, shape, elements=number))
    x = torch.from_numpy(values).to(getattr(torch, dtype))
    if dtype == "complex64":
        x = x + 1j * x.flip(0)
    seen = observe(nn.Identity(), (x,))
    # what a complex number is, is left to torch: abs is the definition
    wide = (x.abs() if x.is_complex() else x).double().numpy()
    finite = np.isfinite(wide)
    largest = np.abs(wide[finite]).max(initial=0.0)
    for name, expected in reference(wide).items():
        got = seen[f"activation/{name}", "", 0]
        if name in ("mean", "rms", "std", "kurtosis") and not 1e-9 < largest < 1e30:
            continue  # sums leave the range of the dtype
        if name in ("std", "kurtosis") and not 1e-6 < largest < 1e6:
            continue  # as do squares of squares
        if name == "kurtosis" and finite.all() and np.std(wide) < 1e-3 * largest:
            continue  # rounding over rounding
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * largest, err_msg=name)
    level = 2.0 if np.isnan(wide).any() else 1.0 if not finite.all() else None
    assert seen.get(("activation/nonfinite", "", 0)) == level
    assert sum(seen["activation/histogram", "", 0].counts) == finite.sum()


@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
def test_the_range_of_a_large_tensor_that_is_not_contiguous(bad):
    x = torch.randn(300, 4, 70, generator=torch.Generator().manual_seed(0)).transpose(0, 2)
    if bad is not None:
        x[1, 2, 3] = bad
    seen = observe(nn.Identity(), (x,))
    for name in ("min", "max", "absmax"):
        np.testing.assert_equal(seen[f"activation/{name}", "", 0], float(reference(x.numpy())[name]))


def test_a_large_tensor_far_from_zero():
    x = torch.randn(64, 128, 33, generator=torch.Generator().manual_seed(0)) * 1e-2 + 100.0
    seen = observe(nn.Identity(), (x,))
    for name, expected in reference(x.numpy()).items():
        assert seen[f"activation/{name}", "", 0] == pytest.approx(expected, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_rms_of_values_whose_squares_leave_the_range(scale):
    for size in (50, 50_000):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale
        seen = observe(nn.Identity(), (x,))
        expected = np.sqrt((x.double() ** 2).mean().item())
        assert seen["activation/rms", "", 0] == pytest.approx(expected, rel=1e-4 if size == 50 else 0.1)


def test_a_sampled_zero_fraction_is_close_on_a_large_tensor():
    x = torch.relu(torch.randn(32, 64, 50, generator=torch.Generator().manual_seed(0)))
    x[:, 5] = 0
    seen = observe(nn.Identity(), (x,))
    assert seen["activation/zero_fraction", "", 0] == pytest.approx((x == 0).float().mean().item(), abs=0.05)


def test_micro_batches_are_combined_over_all_their_values():
    parts = [torch.randn(4 + i, 8) * scale + scale for i, scale in enumerate((1.0, 3.0, 0.1))]
    seen = observe(nn.Sequential(nn.Identity()), *[(part,) for part in parts])
    for name, expected in reference(torch.cat(parts).numpy()).items():
        if name != "kurtosis":  # documented: without its cross terms
            assert seen[f"activation/{name}", "0", 0] == pytest.approx(expected, rel=1e-5), name
    assert sum(seen["activation/histogram", "0", 0].counts) == (4 + 5 + 6) * 8


def test_micro_batches_that_take_different_ways_are_combined_too():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x, direct):
            y = self.a(x)
            return self.b(y if direct else y + 10.0)

    seen = observe(Branches(), (torch.zeros(2, 3), True), (torch.ones(2, 3), False), probe=Activations(("mean", "max")))
    assert seen["activation/input_mean", "b", 0] == pytest.approx(5.5)
    assert seen["activation/mean", "a", 0] == pytest.approx(0.5)
    assert seen["activation/mean", "", 0] == pytest.approx(5.5)
    assert seen["activation/max", "", 0] == pytest.approx(11.0)


def test_an_empty_tensor_brings_no_record_and_no_harm():
    assert observe(nn.Identity(), (torch.ones(0, 3),)) == {}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.first

    def forward(self, x):
        return self.last(self.alias(self.first(x)))


def test_repeated_calls_are_told_apart_and_a_shared_module_has_one_name():
    model, x = Shared(), torch.randn(3, 4)
    seen = observe(model, (x,), probe=Activations(("mean",)))
    once = model.first(x)
    assert seen["activation/mean", "first", 0] == pytest.approx(once.mean().item(), abs=1e-6)
    assert seen["activation/mean", "first", 1] == pytest.approx(model.first(once).mean().item(), abs=1e-6)
    assert "alias" not in {module for _, module, _ in seen}


def test_two_micro_batches_are_not_two_calls():
    seen = observe(Shared(), (torch.ones(2, 4),), (torch.ones(2, 4),), probe=Activations(("mean",)))
    assert {call for _, module, call in seen if module == "last"} == {0}


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor | None, ...]
    note: str = "text"


class Nested(nn.Module):
    def forward(self, x):
        return {"out": Output(x, (x + 1, None)), "again": [x + 2]}


def test_nested_outputs_are_named_by_their_path():
    seen = observe(Nested(), (torch.zeros(2, 3),), probe=Activations(("mean",), inputs=False))
    assert seen == {
        ("activation/mean", "", 0): 0.0,
        ("activation/mean.out.hidden.0", "", 0): 1.0,
        ("activation/mean.again.0", "", 0): 2.0,
    }


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, *, x, mask=None):
        return self.inner(query=x, key=x, value=x, attn_mask=mask)[0]


@both_paths
def test_keywords_masks_and_modules_that_are_never_called(statistics):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    model, memory = KeywordOnly(), sinks.Memory()
    with Monitor(model, probes=[Activations(statistics)], sinks=[memory], strict=True) as monitor:
        model(x=torch.randn(2, 5, 8), mask=mask)
        monitor.step()
    names = {(record.name, record.module) for record in memory.records}
    assert not any(name.startswith("activation/input_nonfinite.") for name, _ in names)  # -Inf in a mask is healthy
    assert not any(name == "activation/nonfinite" for name, _ in names)
    assert "inner.out_proj" not in {module for _, module in names}
    assert not memory.findings


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.fc(x))
        y += 5.0
        return y


def test_values_are_read_before_they_are_changed_in_place():
    model, x = Inplace(), torch.randn(6, 4)
    seen = observe(model, (x,), probe=Activations(("min", "max")))
    before = model.fc(x)
    assert seen["activation/min", "fc", 0] == pytest.approx(before.min().item(), abs=1e-6)
    assert seen["activation/input_min", "act", 0] == pytest.approx(before.min().item(), abs=1e-6)
    assert seen["activation/max", "act", 0] == pytest.approx(before.max().clamp(min=0).item(), abs=1e-6)
    assert seen["activation/max", "", 0] == pytest.approx(before.max().clamp(min=0).item() + 5, abs=1e-5)


def test_lstm_states_packed_sequences_and_complex_outputs():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            packed, _ = self.rnn(pack_padded_sequence(x, torch.tensor([5, 2]), batch_first=True))
            return torch.fft.rfft(packed.data, dim=0)

    seen = observe(Model(), (torch.randn(2, 5, 4),), probe=Activations(("rms",)))
    names = {name for name, module, _ in seen if module == "rnn"}
    assert {"activation/rms", "activation/rms.1.0", "activation/rms.1.1", "activation/input_rms"} <= names
    assert seen["activation/rms", "", 0] > 0


class NoForward(nn.Module):
    """Like BEATs: no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def extract_features(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("statistics", [("nonfinite",), ("nonfinite", "mean")])
def test_a_model_without_forward_and_several_micro_batches(statistics):
    model, memory = NoForward(), sinks.Memory()
    with Monitor(model, probes=[Activations(statistics)], sinks=[memory], strict=True) as monitor:
        for scale in (1.0, 1.0, float("nan")):
            model.extract_features(torch.full((2, 4), scale))
        monitor.step()
    flags = [record for record in memory.records if record.name == "activation/nonfinite"]
    assert [(record.module, record.value, record.call) for record in flags] == [
        (f"layers.{i}", 2.0, 0) for i in range(3)
    ]


def test_checkpointing_does_not_count_the_second_forward():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model, memory = Model(), sinks.Memory()
    with Monitor(model, probes=[Activations()], sinks=[memory], strict=True) as monitor:
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()
        monitor.step()
    assert {sum(record.value.counts) for record in memory.records if record.name == "activation/histogram"} == {12}


def test_eval_calls_outside_of_a_phase_are_not_recorded():
    model, memory = nn.Linear(3, 3).eval(), sinks.Memory()
    with Monitor(model, probes=[Activations()], sinks=[memory], strict=True) as monitor:
        model(torch.ones(2, 3))
        with monitor.phase("val"), torch.inference_mode():
            model(torch.ones(2, 3))
        monitor.step()
    assert {record.phase for record in memory.records} == {"val"}
    assert [finding.code for finding in memory.findings] == ["probe-read-nothing"]
    assert "model.train()" in memory.findings[0].advice


def test_a_buffer_made_in_inference_mode_serves_training_too():
    model, memory = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), sinks.Memory()
    with Monitor(model, probes=[Activations()], sinks=[memory], every=1, strict=True) as monitor:
        with monitor.phase("val"), torch.inference_mode():
            model(torch.ones(2, 3))
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            monitor.step()
    assert {record.phase for record in memory.records} == {"train", "val"}


def test_a_phase_between_micro_batches_keeps_both_apart():
    model, memory = nn.Identity(), sinks.Memory()
    with Monitor(model, probes=[Activations(("mean",), inputs=False)], sinks=[memory], strict=True) as monitor:
        model(torch.full((2, 2), 1.0))
        with monitor.phase("val"):
            model(torch.full((2, 2), 9.0))
        model(torch.full((2, 2), 3.0))
        monitor.step()
    assert [(record.phase, record.value) for record in memory.records] == [("val", 9.0), ("train", 2.0)]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("enc.*", (), {"enc.0", "enc.1"}),
        (nn.ReLU, (), {"enc.1"}),
        (lambda name, module: name == "head", (), {"head"}),
        (("enc*", "head"), nn.Linear, {"enc", "enc.1"}),
    ],
)
def test_modules_are_chosen_by_name_type_or_predicate(include, exclude, expected):
    model = nn.Sequential()
    model.add_module("enc", nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    model.add_module("head", nn.Linear(3, 1))
    seen = observe(model, (torch.ones(2, 3),), probe=Activations(("mean",), include, exclude))
    assert {module for _, module, _ in seen} == expected


def test_a_pattern_that_matches_nothing_is_said():
    model = nn.Sequential(nn.Linear(3, 3))
    with Monitor(model, probes=[Activations(include=("0", "encoder.*"))]) as monitor:
        model(torch.ones(2, 3))
        monitor.step()
    assert [finding.code for finding in monitor.findings] == ["probe-read-nothing"]
    assert "'encoder.*'" in monitor.findings[0].message
    assert "'0'" in monitor.findings[0].advice


def test_unknown_statistics_and_patterns_are_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"\['rsm'\]. Known: \['absmax'"):
        Activations(("rsm",))
    with pytest.raises(TypeError, match="name pattern"):
        Activations(include=(3,))


@both_paths
def test_a_copy_and_a_pickle_of_an_observed_model_are_silent(statistics):
    model, memory = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), sinks.Memory()
    with Monitor(model, probes=[Activations(statistics)], sinks=[memory], strict=True) as monitor:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other(torch.full((2, 3), torch.nan)).isnan().all()
        model(torch.ones(2, 3))
        monitor.step()
    assert not [record for record in memory.records if record.name == "activation/nonfinite"]


@both_paths
def test_no_hook_is_left_and_an_exception_in_forward_does_not_confuse_the_next_step(statistics):
    class Fails(nn.Module):
        def forward(self, x):
            if x.sum() < 0:
                raise ValueError("negative")
            return x

    model, memory = nn.Sequential(nn.Identity(), Fails(), nn.Identity()), sinks.Memory()
    monitor = Monitor(model, probes=[Activations(statistics)], sinks=[memory], every=1, strict=True)
    with pytest.raises(ValueError, match="negative"):
        model(-torch.ones(3, 2))
    monitor.step()
    model(torch.ones(3, 2))
    monitor.step()
    monitor.close()
    assert {record.module for record in memory.records if record.step == 1 and "outermost" in record.name} == {""}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@both_paths
def test_a_call_on_another_thread_is_ignored(statistics):
    model, memory = nn.Linear(2, 2), sinks.Memory()
    with Monitor(model, probes=[Activations(statistics)], sinks=[memory], strict=True) as monitor:
        thread = threading.Thread(target=lambda: model(torch.full((2, 2), torch.nan)))
        thread.start()
        thread.join()
        model(torch.ones(2, 2))
        monitor.step()
    assert not [record for record in memory.records if record.name == "activation/nonfinite"]


@both_paths
def test_functional_transforms_and_compiled_calls_are_left_alone(statistics):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with Monitor(model, probes=[Activations(statistics)], strict=True) as monitor:
        torch.func.vmap(model)(torch.ones(3, 2))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(torch.ones(3, 2)), model(torch.ones(3, 2)))
        monitor.step()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_reported_and_not_read():
    memory = sinks.Memory()
    with Monitor(nn.Identity(), probes=[Activations()], sinks=[memory], strict=True) as monitor:
        monitor.model(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
        monitor.step()
    assert "nested" in {finding.evidence.get("kind") for finding in memory.findings}


def test_a_more_general_probe_covers_a_special_one():
    assert Activations(every=1).covers(Activations(("nonfinite",), every=1))
    assert not Activations().covers(Activations(("nonfinite",), every=1))
    assert not Activations(include="a", every=1).covers(Activations(("nonfinite",), every=1))
    assert not Activations(inputs=False).covers(Activations())
    assert not Activations(phases=("train",)).covers(Activations())


@pytest.mark.parametrize("statistics", [("nonfinite",), ("nonfinite", "max")])
def test_many_calls_in_one_pass_keep_the_flags_of_all_of_them(statistics):
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Identity()

        def forward(self, x):
            for i in range(40):
                x = self.cell(x + (torch.nan if i == 30 else 0.0))
            return x.nan_to_num()

    seen = observe(Loop(), (torch.ones(2, 2),), probe=Activations(statistics))
    assert seen["activation/nonfinite", "cell", 15] == 2.0
    assert ("activation/nonfinite", "cell", 14) not in seen


@both_paths
def test_half_precision_under_autocast_is_read(statistics):
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=-1))
    memory = sinks.Memory()
    with Monitor(model, probes=[Activations(statistics)], sinks=[memory], strict=True) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.full((3, 4), torch.inf)).sum().backward()
        monitor.step()
    flags = [record for record in memory.records if record.name == "activation/nonfinite"]
    assert [record.module for record in flags] == ["0", "1", ""]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("statistics", [("nonfinite",), ("rms",)])
def test_a_scripted_part_is_left_out_and_said(statistics):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    model = nn.Sequential(scripted, nn.Linear(8, 1))
    probe = Activations(statistics=statistics, every=1)
    with Monitor(model, probes=[probe, Parameters(every=1), Inputs(every=1)], strict=True) as monitor:
        monitor.step(loss=model(torch.randn(3, 4)).sum())
    assert [(finding.severity, finding.module) for finding in monitor.findings] == [("info", "0")]
    assert "ScriptModule" in monitor.findings[0].message
    with Monitor(scripted, probes=[probe, Inputs(every=1)], strict=True) as monitor:
        monitor.step(loss=scripted(torch.randn(3, 4)).sum())
    assert {finding.code for finding in monitor.findings} == {"probe-read-nothing"}


class Image(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.as_subclass(Image),
        nn.Parameter,
        lambda x: x.to_sparse(),
        lambda x: torch.nested.nested_tensor([x, x[:2]]),
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
        lambda x: x.to(torch.complex64),
    ],
    ids=["subclass", "parameter", "sparse", "nested", "jagged", "complex"],
)
def test_flags_survive_every_kind_of_tensor(make):
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x), torch.full((2, 2), torch.nan)

    model, memory = First(), Memory()
    with Monitor(
        model, probes=[Activations(statistics=("nonfinite",), every=1)], sinks=[memory], strict=True
    ) as monitor:
        model(make(torch.randn(3, 4)))
        monitor.step()
    assert {record.name: record.value for record in memory.records if record.source == "probe"}[
        "activation/nonfinite.1"
    ] == 2.0


def test_flags_work_with_parametrized_weights():
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), orthogonal(nn.Linear(4, 4)))
    memory = Memory()
    with Monitor(
        model, probes=[Activations(statistics=("nonfinite",), every=1)], sinks=[memory], strict=True
    ) as monitor:
        model(torch.full((3, 4), torch.nan))
        monitor.step()
    bad = [record.module for record in memory.records if record.name == "activation/nonfinite"]
    assert bad == ["0", "1", ""]


class Changing(nn.Module):
    """A layer whose output is changed in place by the one after it, from a given call on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.first, self.last = nn.Identity(), nn.Identity()
        self.calls, self.since = 0, since

    def forward(self, x):
        y = self.first(x * 1.0)
        if self.calls >= self.since:
            y = y.clamp_(min=0.0) if self.since == 0 else y.mul_(torch.nan)
        self.calls += 1
        return self.last(y)


def flags_of(model, inputs):
    memory = Memory()
    with Monitor(model, probes=[Activations(("nonfinite",), every=1)], sinks=[memory], strict=True) as monitor:
        for x in inputs:
            model(x)
            monitor.step()
    return [(r.step, r.module) for r in memory.records if r.name == "activation/nonfinite"]


def test_an_output_that_is_always_changed_in_place_is_read_before_it_is_changed():
    lost = torch.full((2, 2), -torch.inf)  # clamp makes it zero
    assert flags_of(Changing(0), [torch.ones(2, 2), torch.ones(2, 2), lost]) == [(2, "first")]


def test_an_output_that_is_changed_in_place_for_the_first_time_does_not_accuse_its_module():
    assert flags_of(Changing(3), [torch.ones(2, 2)] * 4) == [(3, "last"), (3, "")]


@pytest.mark.parametrize("sizes", [(2, 5, 3), (2, 4096, 2, 1), (3, 0, 3)], ids=str)
def test_small_outputs_of_changing_size_are_read_together(sizes):
    model = nn.Sequential(nn.Identity(), nn.Tanh(), nn.Linear(3, 3))
    assert flags_of(model, [torch.ones(n, 3) for n in sizes]) == []
    bad = [torch.ones(n, 3) for n in sizes]
    bad[-1][-1, -1] = torch.inf
    last = len(sizes) - 1
    assert flags_of(model, bad) == [(last, "0")]  # tanh makes it finite


def test_no_output_is_held_after_the_pass():
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            y = x * 2
            seen.append(weakref.ref(y))
            return y

    model = nn.Sequential(Watched(), nn.Tanh(), Watched())
    with Monitor(model, probes=[Activations(("nonfinite",), every=1)], strict=True) as monitor:
        for _ in range(3):
            model(torch.ones(4, 3))
            assert [each() for each in seen] == [None] * len(seen)
            monitor.step()


@pytest.mark.parametrize("statistics", [("rms", "histogram", "min", "mean"), ALL])
def test_tensors_of_many_sizes_in_one_model_keep_their_own_numbers(statistics):
    sizes = [4, 4, 5, 700, 700, 3, 900, 4, 4]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    memory, passes = Memory(), [torch.randn(3, 4), torch.randn(3, 4) * 1e20, torch.randn(2, 4)]
    with Monitor(model, probes=[Activations(statistics)], sinks=[memory], strict=True) as monitor:
        for x in passes:
            model(x)
        monitor.step()
    values = {(r.name, r.module): r.value for r in memory.records}
    inputs = passes
    for i, layer in enumerate(model):
        inputs = [layer(x) for x in inputs]
        expected = np.concatenate([x.detach().double().numpy().ravel() for x in inputs])
        assert values["activation/rms", str(i)] == pytest.approx(
            np.sqrt((expected**2).mean()),
            rel=1e-5 if expected.size <= 2048 else 0.15,  # squares overflow: from the sample
        )
        assert values["activation/min", str(i)] == pytest.approx(expected.min(), rel=1e-6)
        if expected.size <= 2048:
            assert sum(values["activation/histogram", str(i)].counts) == expected.size
