from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stethoscope.cli import app

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.norm, self.drop = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Dropout(0.2)

    def forward(self, x):
        return self.norm(self.drop(torch.log(self.front(x).square().mean(0))))

class Sized(Net):
    def __init__(self, size):
        super().__init__()

def make(bias=True):
    return Net()

def step(model, batch):
    return model(batch).square().mean()
"""

TRAIN = """
import torch
from replay_nets import Net, step
from stethoscope import Monitor

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), 0.01)
with Monitor(model, optimizer, guard="skip", sinks="run") as monitor:
    for i in range(5):
        x = torch.randn(4, 6)
        if i == 3:
            with torch.no_grad():
                model.front.bias.zero_()
                x.zero_()
        loss = step(model, x)
        optimizer.zero_grad()
        loss.backward()
        monitor.observe(x, loss=loss)
        optimizer.step()
        monitor.step(loss=loss)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with code and the run of a script that has trained there."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "replay_nets.py").write_text(NETS)
    (folder / "train.py").write_text(TRAIN)
    call(folder, "train.py")
    return folder


def call(folder, *arguments, check=True):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "callbacks"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=check
    )


def invoke(*arguments):
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def test_another_process_prints_the_same_culprit_from_the_folder_alone(work):
    done = call(work, "-m", "stethoscope", "replay", "run/incidents/step3")
    assert "The same culprit." in done.stdout
    assert "aten.log" in done.stdout
    assert "replay_nets.py:10 in forward: return self.norm(self.drop(torch.log" in done.stdout


def test_options_and_exit_codes(work, monkeypatch):
    monkeypatch.chdir(work)
    folder = work / "run" / "incidents" / "step3"
    assert invoke(folder).exit_code == 0
    done = invoke(folder, "--model", "replay_nets:make", "--arguments", '{"bias": false}', "--json")
    assert done.exit_code == 0
    shown = json.loads(done.stdout)
    assert (shown["reproduced"], shown["culprit"]["operation"]) == (True, "aten.log")
    done = invoke(folder, "--model", "replay_nets:Net", "--step", "replay_nets:step")
    assert done.exit_code == 0, done.output
    for arguments, message in {
        ("nowhere",): "is no folder",
        (folder, "--model", "torch.nn:ReLU"): "ReLU does not fit the incident",
        (folder, "--model", "replay_nets:nothing"): "has no 'nothing'",
        (folder, "--step", "replay_nets"): "package.module:name",
    }.items():
        done = invoke(*arguments)
        assert (done.exit_code, message in done.output) == (2, True), done.output


def test_a_replay_that_differs_says_so_and_exits_with_one(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setattr("torch.log", torch.log1p)
    done = invoke(work / "run" / "incidents" / "step3")
    assert done.exit_code == 1
    assert "replay-differed" in done.output
    assert "nothing non-finite here" in done.output


def test_markup_and_control_characters_are_shown_as_they_are(work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    for each in (work / "run" / "incidents" / "step3").iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    note = json.loads((tmp_path / "incident.json").read_text())
    note["left_out"] = ["[bold red]x[/] \x1b[31m"]
    note["culprit"]["module"] = "[link=http://a.b]m[/link]\x1b]0;t\x07"
    note["state"]["\x1b[2J[red]"] = {"kind": "left out", "why": ""}
    (tmp_path / "incident.json").write_text(json.dumps(note))
    done = invoke(tmp_path)
    assert done.exit_code == 1
    assert "[bold red]x[/] \\x1b[31m" in done.output
    assert "[link=http://a.b]m[/link]\\x1b]0;t\\x07" in done.output
    note["state"]["\x1b[2J[red]"] = {"kind": "tensor", "name": "state.norm.bias", "grad": False}
    (tmp_path / "incident.json").write_text(json.dumps(note))
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert "\\x1b[2J[red]" in done.output
    assert "\x1b" not in done.output


def test_a_model_that_raises_is_no_verdict(work, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    for each in (work / "run" / "incidents" / "step3").iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    note = json.loads((tmp_path / "incident.json").read_text())
    note["calls"][0]["args"]["items"] = []
    (tmp_path / "incident.json").write_text(json.dumps(note))
    assert invoke(tmp_path).exit_code == 2
