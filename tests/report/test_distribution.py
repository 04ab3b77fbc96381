import json

import msgspec
import numpy as np

from stethoscope.report._distribution import Distribution


def raw(value):
    return msgspec.Raw(json.dumps(value).encode())


def test_an_even_choice_of_steps_with_the_first_and_the_last():
    kept = Distribution(most=4)
    for step in range(100):
        kept.add(step, raw([["a", [step + 1, 1]], ["b", [0, 0]]]), raw([0, 1, 2]))
    shares = kept.shares(["a", "b", "c"])
    assert shares.layers == ("a",)  # b counted nothing, c was not there
    assert (shares.steps[0], shares.steps[-1], len(shares.steps)) == (0, 99, 5)
    assert shares.shares[0, 0].tolist() == [0.5, 0.5]
    assert np.isclose(shares.shares[0, -1, 0], 100 / 101)


def test_empty_bins_at_both_ends_are_cut_off_and_calls_are_added():
    kept = Distribution()
    kept.add(0, raw([["a", [0, 1, 0, 0]], ["a", [0, 1, 2, 0], 1]]), raw([-2, -1, 0, 1, 2]))
    shares = kept.shares(["a"])
    assert shares.edges == (-1.0, 0.0, 1.0)
    assert shares.shares[0, 0].tolist() == [0.5, 0.5]


def test_what_cannot_be_read_is_left_out():
    kept = Distribution()
    assert kept.shares(["a"]) is None
    kept.add(0, raw([["a", [1, 2]]]), raw([0, 1, 2]))
    kept.add(1, raw([["a", "x"], ["b", [1]]]), raw([0, 1, 2]))
    kept.add(2, raw([["a", [1, 2, 3]]]), raw([0, 1, 2, 3]))
    assert kept.shares(["a"]).steps[0] == 0
    damaged = Distribution()
    damaged.add(0, raw([["a", [1, 2]]]), raw(["x"]))
    assert damaged.shares(["a"]) is None
