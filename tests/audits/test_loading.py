import pytest
import torch
from torch import nn

from stethoscope import audits


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_complete_load_gives_no_finding():
    model = make(0)
    with audits.loading(model) as watched:
        model.load_state_dict(make(1).state_dict())
    assert watched.report.findings == ()
    assert watched.report.changed_fraction == 1.0


def test_the_parameters_that_strict_false_left_out_are_named():
    model = make(0)
    with audits.loading(model) as watched:
        model.load_state_dict({"0.weight": torch.ones(4, 4), "module.2.weight": torch.ones(2, 4)}, strict=False)
    report = watched.report
    assert report.changed == ("0.weight",)
    assert report.unchanged == ("0.bias", "2.weight", "2.bias")  # the scale of ones cannot tell
    assert [finding.code for finding in report.findings] == ["checkpoint-unchanged"]
    assert report.changed_fraction == 16 / (16 + 4 + 8 + 2)


def test_updating_the_own_state_dict_is_seen_through():
    model, found = make(0), {"module.0.weight": torch.ones(4, 4)}
    with audits.loading(model) as watched:
        state = model.state_dict()
        state.update({key: value for key, value in found.items() if key in state})
        model.load_state_dict(state)  # strict, and without effect
    assert watched.report.changed == ()
    assert not watched.report.ok


def test_what_stays_on_purpose_can_be_declared():
    model, other = make(0), make(1).state_dict()
    with audits.loading(model, partial=["2"]) as watched:
        model.load_state_dict({key: value for key, value in other.items() if not key.startswith("2.")}, strict=False)
    assert watched.report.ok


def test_an_exception_passes_through():
    with pytest.raises(RuntimeError, match="Missing key"), audits.loading(make(0)):
        make(0).load_state_dict({})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_type_of_weight_is_compared(dtype):
    model = nn.Linear(3, 3, dtype=dtype)
    with audits.loading(model) as watched, torch.no_grad():
        model.weight[0, 0] += 1
    assert watched.report.changed == ("weight",)
    assert watched.report.unchanged == ("bias",)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3, device="meta"), lambda: nn.LazyLinear(3)])
def test_parameters_without_values_are_reached_or_not(make):
    model = make()
    with audits.loading(model) as watched:
        pass
    assert watched.report.unchanged == ("weight", "bias")
    assert not watched.report.ok
    with audits.loading(model) as watched:
        model.load_state_dict(nn.Linear(4, 3).state_dict(), assign=model.weight.is_meta)
    assert watched.report.changed == ("weight", "bias")
    assert watched.report.ok
