import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from stethoscope.cli import app


def run(*arguments):
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_plan_says_what_happens_and_exits_by_it():
    schedule = ("--start", 2500, "--stop", 8000, "--interval", 50)
    code, text = run("plan", *schedule, "--steps", 1200)
    assert code == 1
    assert "schedule-unreachable" in text
    assert run("plan", *schedule, "--epochs", 9, "--batches", 1000, "--max-steps", 100)[0] == 1
    assert run("plan", *schedule, "--planned-steps", 8000)[0] == 0
    lightning = (
        "--epochs",
        4000,
        "--batches",
        5,
        "--accumulate",
        4,
    )  # 2 steps per epoch: the rest makes one of its own
    assert [run("plan", *schedule, *lightning, *flush)[0] for flush in ((), ("--flush",))] == [1, 0]
    code, text = run("plan", *schedule, "--epochs", 75, "--items", 30000, "--batch-size", 128, "--drop-last", "--json")
    assert code == 0
    assert json.loads(text)["verdict"] == "reached"


def test_plan_explains_bad_input():
    code, text = run("plan", "--start", 9, "--stop", 3, "--steps", 5)
    assert code == 2
    assert "start <= stop" in text
    code, text = run("plan", "--start", 1, "--stop", 3)
    assert code == 2
    assert "--epochs" in text


def test_checkpoint_compares_with_a_model(tmp_path):
    path = tmp_path / "linear.pt"
    state = nn.Linear(3, 2).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    model = ("--model", "torch.nn:Linear", "--arguments", '{"in_features": 3, "out_features": 2}')
    code, text = run("checkpoint", path, *model, "--json")
    assert code == 1
    found = json.loads(text)
    assert found["suggested_prefix"] == "module."
    assert found["loaded_fraction"] == 0.0
    torch.save(state, path)
    assert run("checkpoint", path, *model)[0] == 0


def test_checkpoint_examines_a_file_alone(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": nn.Linear(3, 2).state_dict(), "config": {"sample_rate": 8000}}, path)
    code, text = run("checkpoint", path)
    assert code == 0
    assert "2 tensors, 8 elements" in text
    assert "sample_rate: 8000" in text
    torch.save({"weight": torch.full((3, 3), float("nan"))}, path)
    code, text = run("checkpoint", path)
    assert code == 1
    assert "checkpoint-nonfinite" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "torch.nn"), "package.module:name"),
        (("--model", "absent.module:Model"), "Cannot import"),
        (("--model", "torch.nn:Absent"), "has no 'Absent'"),
        (("--model", "torch:zeros", "--arguments", '{"size": [2]}'), "not a torch.nn.Module"),
        (("--model", "torch.nn:Linear", "--arguments", "[3, 2]"), "no JSON object"),
        (("--model", "torch.nn:Linear", "--arguments", "{"), "no JSON"),
    ],
)
def test_checkpoint_explains_bad_input(tmp_path, arguments, says):
    torch.save({"weight": torch.ones(1)}, tmp_path / "any.pt")
    code, text = run("checkpoint", tmp_path / "any.pt", *arguments)
    assert code == 2
    assert says in text


def test_a_missing_file_is_an_error_of_its_own(tmp_path):
    code, text = run("checkpoint", tmp_path / "absent.pt")
    assert code == 2
    assert "absent.pt" in text


def test_audio_takes_files_and_folders(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    noise = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / "a.wav", noise.numpy(), 16000)
    assert run("audio", tmp_path, "--sample-rate", 16000)[0] == 0
    code, text = run("audio", tmp_path / "a.wav", "--sample-rate", 8000, "--json")
    assert code == 1
    assert [finding["code"] for finding in json.loads(text)["findings"]] == ["audio-rate"]
    (tmp_path / "empty").mkdir()
    code, text = run("audio", tmp_path / "empty", "--sample-rate", 8000)
    assert code == 2
    assert "No audio files" in text


def test_the_commands_are_there_for_users():
    command = [sys.executable, "-m", "stethoscope", "audit", "plan", "--start", "0", "--stop", "5", "--steps", "9"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
