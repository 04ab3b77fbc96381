from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stethoscope.audits._pack import DEPTH, Packer, unpack

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
KINDS += [torch.complex64, torch.complex128, torch.float8_e4m3fn]

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.builds(
        lambda shape, kind: torch.arange(math.prod(shape)).reshape(shape).to(kind),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(KINDS),
    ),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=8,
)


def there_and_back(value, max_bytes=10**6):
    packer = Packer(max_bytes)
    node = packer.pack(value, "x")
    return unpack(json.loads(json.dumps(node, allow_nan=False)), packer.tensors), packer


def same(left, right):
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype and torch.equal(left.double(), right.double())
            if not left.is_complex()
            else torch.equal(left, right)
        )
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(each, right[key]) for key, each in left.items())
    return left == right or (left != left and right != right)


@settings(max_examples=60, deadline=None)
@given(values)
def test_what_goes_in_comes_out(value):
    back, packer = there_and_back(value)
    assert same(value, back)
    assert packer.left_out == []


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["kind", "name", "fields", "items", "value", "grad", "data"]), inner),
            st.fixed_dictionaries(
                {
                    "kind": st.sampled_from(
                        [
                            "tensor",
                            "value",
                            "float",
                            "dtype",
                            "array",
                            "tuple",
                            "named",
                            "packed",
                            "object",
                            "dict",
                            "nested",
                        ]
                    )
                },
                optional={"fields": inner, "items": inner, "value": inner, "name": inner},
            ),
        ),
        max_leaves=10,
    )
)
def test_a_hostile_node_is_refused_or_plain_data(node):
    with suppress(ValueError):
        unpack(node, {"a": torch.ones(2)})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_containers_of_the_field():
    class Pair(NamedTuple):
        x: torch.Tensor
        lengths: list[int]

    @dataclass
    class Batch:
        x: torch.Tensor
        name: str

    packed = pack_padded_sequence(torch.randn(5, 3, 2), torch.tensor([5, 2, 4]), enforce_sorted=False)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)])
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    back, packer = there_and_back(
        [Pair(torch.ones(2), [3]), Batch(torch.zeros(2, 2), "a"), packed, nested, array, torch.bfloat16, jagged]
    )
    assert back[0].lengths == [3]
    assert back[1].name == "a"
    assert torch.equal(pad_packed_sequence(back[2])[0], pad_packed_sequence(packed)[0])
    assert torch.equal(back[3].unbind()[1], torch.zeros(4, 3))
    assert np.array_equal(back[4], array)
    assert back[5] is torch.bfloat16
    assert (back[6].layout, back[6].unbind()[0].shape) == (torch.jagged, (2, 3))
    assert packer.left_out == []


def test_views_and_shared_tensors_are_kept_once_and_small():
    whole = torch.randn(1000, 4)
    part, wide = whole[3:5], torch.ones(1).expand(50)
    back, packer = there_and_back({"a": part, "b": part, "c": wide, "grad": nn.Parameter(torch.ones(2))})
    assert torch.equal(back["a"], part)
    assert torch.equal(back["c"], wide)
    assert back["grad"].requires_grad
    assert sorted(each.numel() for each in packer.tensors.values()) == [2, 8, 50]


def test_what_cannot_be_kept_is_left_out_and_named():
    deep = []
    for _ in range(DEPTH + 2):
        deep = [deep]
    value = {"big": torch.zeros(1000), "small": torch.zeros(2), "f": print, 3: "x"}
    back, packer = there_and_back([value, torch.eye(3).to_sparse(), object(), deep, torch.empty(2, device="meta")], 100)
    assert back[0] is back[1] is back[2] is None
    assert ["text" in packer.left_out[0], "sparse" in packer.left_out[1], "object" in packer.left_out[2]] == [True] * 3
    assert "too deep" in packer.left_out[3]
    del value[3]
    back, packer = there_and_back(value, 100)
    assert back["big"] is None
    assert torch.equal(back["small"], torch.zeros(2))
    assert packer.left_out == [
        "x.big has 4000 bytes, and 100 were left",
        "x.f is an object of builtin_function_or_method",
    ]


@pytest.mark.parametrize(
    "node",
    [{"kind": "dtype", "value": "os"}, {"kind": "named", "fields": {"import os": {"kind": "value", "value": 1}}}],
)
def test_names_of_a_bundle_are_no_code(node):
    with pytest.raises(ValueError, match=r"no dtype|identifiers"):
        unpack(node, {})
