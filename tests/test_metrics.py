import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stethoscope._metrics import normalise


def kinds(metrics):
    return {metric.name: metric.kind for metric in normalise(metrics)}


def only(value):
    (metric,) = normalise({"a": value})
    return metric


@pytest.mark.parametrize(
    ("value", "number", "kind"),
    [
        (1.5, 1.5, "float"),
        (2, 2.0, "int"),
        (True, 1.0, "bool"),
        (np.float32(0.5), 0.5, "float"),
        (np.float16(0.5), 0.5, "float"),
        (np.float64(0.5), 0.5, "float"),
        (np.int64(3), 3.0, "int"),
        (np.bool_(True), 1.0, "bool"),
        (np.array(0.25), 0.25, "float"),
        (np.array([[4]]), 4.0, "int"),
        ((0.5, 8), 0.5, "pair"),
        ((np.float32(0.5), torch.tensor(8)), 0.5, "pair"),
        (None, None, "none"),
        ("good", None, "str"),
        (b"good", None, "str"),
        ([1.0, 2.0], None, "list"),
        ((1.0, 2.0, 3.0), None, "list"),
        ([torch.tensor(1.0)], None, "list"),
        ([], None, "list"),
        ([[1.0]], None, "other"),
        (["a"], None, "other"),
        ((), None, "other"),
        ((1.0, None), None, "other"),
        ((1.0, "a"), None, "other"),
        (((1.0, 2.0), 3.0), None, "other"),
        (np.zeros(3), None, "other"),
        (np.array(["a"]), None, "other"),
        (1j, None, "other"),
        (10**400, None, "other"),
        (object(), None, "other"),
    ],
)
def test_a_value_on_the_host_becomes_a_float_or_none(value, number, kind):
    metric = only(value)
    assert (metric.value, metric.kind) == (number, kind)
    assert metric.value is None or type(metric.value) is float


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_of_one_element_stays_a_tensor(shape, dtype):
    metric = only(torch.ones(shape, dtype=dtype))
    assert metric.kind == "tensor"
    assert metric.value.shape == ()
    assert metric.value.dtype == dtype


def test_a_tensor_with_a_gradient_is_detached_and_marked():
    loss = (torch.ones(3, requires_grad=True) * 2).sum()
    metric = only(loss)
    assert metric.kind == "tensor-grad"
    assert not metric.value.requires_grad
    assert loss.requires_grad


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3),
        torch.zeros(0),
        torch.ones(1, dtype=torch.complex64),
        torch.ones((), device="meta"),
        torch.ones(1).to_sparse(),
    ],
    ids=["many", "none", "complex", "meta", "sparse"],
)
def test_a_tensor_that_is_no_scalar_is_never_read(tensor):
    assert only(tensor)[1:] == (None, "other")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_other():
    assert only(torch.nested.nested_tensor([torch.zeros(1)])).kind == "other"


def test_a_huge_tensor_costs_nothing():
    assert only(torch.zeros(1).expand(1 << 40)).kind == "other"


def test_nothing_waits_for_the_device():
    # A fake tensor raises as soon as somebody asks for its value.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        value = torch.ones(1)
        metrics = normalise({"loss": value, "pair": (value, 3), "many": [value]})
    assert [metric.kind for metric in metrics] == ["tensor", "pair", "list"]


def test_a_loss_tuple_in_place_of_a_loss_is_other_not_a_pair():
    loss, probabilities = torch.tensor(3.0, requires_grad=True), torch.zeros(2, 5, 7)
    assert only((loss, probabilities)).kind == "other"
    assert only((loss, loss * 2)).kind == "other"


def test_nested_dictionaries_are_flattened_in_order():
    nested = {"train": {"loss": 1.0, "er": {"ctc": 0.5}}, "lr": 0.1, "empty": {}}
    assert [metric.name for metric in normalise(nested)] == ["train/loss", "train/er/ctc", "lr"]


def test_loss_stats_weight_becomes_one_dictionary():
    loss = torch.tensor(2.0, requires_grad=True)
    flat = normalise((loss, {"acc": torch.ones(1), "cer": None}, torch.tensor([4.0])))
    assert {metric.name: metric.kind for metric in flat} == {
        "loss": "tensor",
        "acc": "tensor",
        "cer": "none",
        "weight": "tensor",
    }
    assert not flat[0].value.requires_grad


def test_stats_that_hold_the_loss_already_win():
    loss = torch.tensor(2.0, requires_grad=True)
    flat = normalise((loss, {"loss": loss.detach(), "weight": 3.0}, 4))
    assert [(metric.name, metric.kind) for metric in flat] == [("loss", "tensor"), ("weight", "float")]


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        (3.0, "got 3.0"),
        (None, "got None"),
        ([1.0, 2.0], "a list of 2"),
        ((1.0, 2.0), "a tuple of 2"),
        ((torch.ones(2), [], 3), "a tuple of 3 (Tensor, list, int)"),
        (torch.ones(2), "a Tensor"),
    ],
)
def test_what_is_no_dictionary_is_refused(given_, says):
    with pytest.raises(TypeError, match="must be a dictionary") as error:
        normalise(given_)
    assert says in str(error.value)


@pytest.mark.parametrize("metrics", [{1: 2.0}, {None: 2.0}, {("a", "b"): 2.0}])
def test_names_that_are_no_strings_are_refused(metrics):
    with pytest.raises(TypeError, match="must be strings"):
        normalise(metrics)
    with pytest.raises(TypeError, match=r"must be strings.*in 'train'"):
        normalise({"train": metrics})


def test_the_given_dictionary_is_left_alone():
    metrics = {"a": {"b": 1.0}, "c": torch.ones(1)}
    normalise(metrics)
    assert metrics == {"a": {"b": 1.0}, "c": torch.ones(1)}


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.floats(), max_size=3)
)


@given(st.dictionaries(st.text(max_size=4), st.recursive(LEAVES, lambda x: st.dictionaries(st.text(max_size=4), x))))
def test_any_dictionary_of_plain_values_is_taken(metrics):
    for name, value, kind in normalise(metrics):
        assert isinstance(name, str)
        assert kind in {"float", "int", "bool", "none", "list", "str", "other"}
        assert value is None or isinstance(value, float)


@given(st.floats())
def test_a_number_is_not_changed(number):
    value = only(number).value
    assert value == number or (math.isnan(value) and math.isnan(number))
