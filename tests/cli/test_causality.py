import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from stethoscope.cli import app
from stethoscope.testing import assert_causal

torch.set_num_threads(1)
MODELS = """
from torch import nn

def leaky():
    return nn.Sequential(nn.Conv1d(1, 4, 1), nn.GroupNorm(1, 4))

def broken():
    raise KeyError("no such checkpoint")

def encoder():
    return nn.Conv1d(1, 4, 16, stride=8)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
    def extract(self, x, y):
        return {"h": self.rnn(x)[0] + y.sum(-1, keepdim=True)}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "made_up_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def invoke(*arguments):
        return CliRunner().invoke(app, ["audit", "causality", *arguments])

    yield invoke
    sys.modules.pop("made_up_models", None)


def test_a_leak_exits_with_one_and_names_the_module(run):
    result = run("made_up_models:leaky", "--shape", "2,1,200")
    assert result.exit_code == 1
    assert "'1' (GroupNorm)" in result.stdout


def test_json_holds_the_verdict_and_a_declared_window_exits_with_zero(run):
    result = run("made_up_models:encoder", "--shape", "2,1,800", "--allowed", "15", "--sample-rate", "8000", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["ok"], found["causal"], found["lookahead"], found["lookahead_ms"]) == (True, False, 15, 1.875)
    assert set(found["per_mode"]) == {"eval", "train"}


def test_a_class_a_method_two_inputs_and_an_output_key_are_taken(run):
    options = ("--time-axis", "1", "--forward", "extract", "--output", "h", "--mode", "eval")
    result = run("made_up_models:Recurrent", "--shape", "2,40,3", "--shape", "2,40,3", *options)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("made_up_models", "--shape", "2,1,200"), "package.module:name"),
        (("no_such_thing:x", "--shape", "2,1,200"), "Cannot import"),
        (("made_up_models:nothing", "--shape", "2,1,200"), "has no 'nothing'"),
        (("made_up_models:leaky", "--shape", "2,x"), "--shape"),
        (("made_up_models:leaky", "--shape", "2,1,200", "--dtype", "float7"), "dtype"),
        (("made_up_models:leaky", "--shape", "2,5,200"), "fails on x"),
        (("made_up_models:leaky", "--shape", "2,1,-200"), "1 or more"),
        (("made_up_models:broken", "--shape", "2,1,200"), "no such checkpoint"),
    ],
)
def test_what_cannot_be_judged_exits_with_two_and_says_why(run, arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_assert_causal_raises_with_the_readable_report():
    x = torch.randn(2, 4, 60, generator=torch.Generator().manual_seed(0))
    assert_causal(lambda x: x.cumsum(-1), x)
    assert_causal(lambda x: torch.nn.functional.pad(x, (0, 2))[..., 2:], x, 2)
    with pytest.raises(AssertionError, match=r"looks ahead by 59 input steps(.|\n)*x\.mean"):
        assert_causal(lambda x: x - x.mean(-1, keepdim=True), x)


def test_arguments_of_the_factory_are_taken(run):
    arguments = '{"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": 1}'
    result = run("torch.nn:Conv1d", "--shape", "2,1,200", "--arguments", arguments, "--json")
    assert json.loads(result.stdout)["lookahead"] == 1
