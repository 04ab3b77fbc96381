from __future__ import annotations

import copy
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stethoscope import FindingsError, Monitor, audits, sinks
from stethoscope.audits import _incident

nan = float("nan")


class Root(nn.Module):
    """Dropout, BatchNorm and a square root whose slope is infinite at zero."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.drop, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)

    def forward(self, x):
        y = self.drop(self.norm(self.inp(x)))
        return self.out((y - y.detach()).abs().sqrt() if x[0, 0] > 100 else y)


def make():
    torch.manual_seed(0)
    random.seed(0)
    return Root()


def train(model, monitor, optimizer, data, *, clip=False):
    for x in data:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        monitor.observe(x, loss=loss)
        optimizer.step()
        monitor.step(loss=loss)


def batches(n, bad, value=nan):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(6, 4, generator=generator) for _ in range(n)]
    made[bad][2 if value != value else 0, 0] = value
    return made


def run(folder, *, value=nan, act="skip", clip=False, wrap=lambda sink: sink, n=4):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Monitor(model, optimizer, guard=act, sinks=[wrap(sinks.Jsonl(folder))], strict=True) as monitor:
        train(model, monitor, optimizer, batches(n, 2, value), clip=clip)
    return model, monitor


def note_of(folder):
    return json.loads((folder / "incident.json").read_text(), parse_constant=lambda text: 1 / 0)


@pytest.mark.parametrize("wrap", [lambda sink: sink, sinks.OnRank, lambda sink: sinks.Every(sink, 5)])
def test_the_guard_keeps_the_bad_step_in_the_run_folder(tmp_path, wrap):
    _, monitor = run(tmp_path, wrap=wrap)
    folder = tmp_path / "incidents" / "step2"
    finding = monitor.findings[0]
    assert finding.evidence["incident"] == str(folder)
    assert f"stethoscope replay {folder}" in finding.message
    assert sorted(each.name for each in folder.iterdir()) == ["incident.json", "tensors.safetensors"]
    note = note_of(folder)
    assert (note["step"], note["rank"], note["loss"]) == (2, 0, "NaN")
    assert note["culprit"]["origin"] == "input"
    assert note["culprit"]["samples"] == [2]
    assert note["findings"][0]["code"] == "nonfinite-input"
    assert note["model"]["class"].endswith(":Root")
    assert note["left_out"] == []
    kept = load_file(folder / "tensors.safetensors")
    assert torch.equal(kept["calls.0.args.0"].isnan().nonzero(), torch.tensor([[2, 0]]))
    assert list(tmp_path.glob("**/.*")) == []


def test_weights_statistics_and_random_numbers_are_those_before_the_bad_step(tmp_path):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = batches(4, 2)
    with Monitor(model, optimizer, guard="raise", sinks=[tmp_path]) as monitor:
        train(model, monitor, optimizer, data[:2])
        before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        with pytest.raises(FindingsError, match="stethoscope replay"):
            train(model, monitor, optimizer, data[2:])
    kept = load_file(tmp_path / "incidents" / "step2" / "tensors.safetensors")
    assert {name: torch.equal(each, kept[f"state.{name}"]) for name, each in before.items()} == dict.fromkeys(
        before, True
    )
    assert torch.equal(kept["random.0.torch"], rng)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_without_a_run_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, monitor = run("today.jsonl")
    assert "incident" not in monitor.findings[0].evidence
    assert [each.name for each in tmp_path.iterdir()] == ["today.jsonl"]


def test_nothing_of_the_environment_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-0123")
    run(tmp_path)
    folder = tmp_path / "incidents" / "step2"
    text = (folder / "incident.json").read_bytes() + (folder / "tensors.safetensors").read_bytes()
    assert b"very-secret" not in text
    assert os.uname().nodename.encode() not in text
    assert str(tmp_path).encode() not in text


def test_a_full_disk_loses_the_bundle_and_says_so_but_never_the_training(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model, monitor = run(tmp_path)
    assert "No space left on device" in monitor.findings[0].message
    assert monitor.findings[0].code == "nonfinite-input"
    assert list((tmp_path / "incidents").iterdir()) == []
    assert [finding.code for finding in monitor.findings] == ["nonfinite-input", "step-skipped"]
    assert all(torch.isfinite(each).all() for each in model.parameters())


def test_a_path_that_cannot_be_a_folder_is_reported(tmp_path):
    (tmp_path / "incidents").write_text("in the way")
    _, monitor = run(tmp_path)
    assert "could not be written" in monitor.findings[0].message
    assert monitor.findings[0].evidence["incident"] == ""


def test_an_existing_incident_is_never_overwritten(tmp_path):
    run(tmp_path)
    before = (tmp_path / "incidents" / "step2" / "incident.json").read_bytes()
    run(tmp_path)
    assert sorted(each.name for each in (tmp_path / "incidents").iterdir()) == ["step2", "step2.2"]
    assert (tmp_path / "incidents" / "step2" / "incident.json").read_bytes() == before


def test_a_run_keeps_ten_incidents_at_most(tmp_path):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    good, bad = torch.randn(6, 4), torch.full((6, 4), nan)
    with Monitor(model, optimizer, guard="skip", sinks=[tmp_path]) as monitor:
        train(model, monitor, optimizer, [bad, good] * 12)
    assert len(list((tmp_path / "incidents").iterdir())) == 10
    assert (
        "10 incidents of this run" in [each for each in monitor.findings if each.code == "nonfinite-input"][-1].message
    )


def test_what_does_not_fit_is_left_out_and_the_guilty_weight_goes_first(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3000), nn.BatchNorm1d(3000), nn.Linear(3000, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = nan
    report = audits.nonfinite(model, torch.randn(6, 4))
    incident = _incident.Incident(model, report.findings, report, (report._call,))
    folder = _incident.write(incident, tmp_path / "small", max_bytes=60_000)
    note, kept = note_of(folder), load_file(folder / "tensors.safetensors")
    assert torch.isnan(kept["state.0.weight"][0, 0])
    assert "state.2.running_mean" in kept
    assert "state.1.weight" not in kept
    assert not note["model"]["whole"]
    assert any("parameters" in each for each in note["left_out"])
    assert sum(each.numel() * each.element_size() for each in kept.values()) <= 60_000


def test_a_report_saves_itself(tmp_path):
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="no culprit"):
        audits.nonfinite(model, torch.randn(3, 4)).save(tmp_path / "none")
    x = torch.randn(3, 4)
    x[1] = nan
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = audits.nonfinite(model, x)
    folder = report.save(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    note = note_of(folder)
    assert note["calls"][0]["autocast"] == [["cpu", "bfloat16"]]
    assert (note["step"], note["culprit"]["samples"]) == (None, [1])


def test_a_class_of_a_script_or_of_a_function_is_not_said_to_be_importable(tmp_path):
    class Local(nn.Linear):
        pass

    script = type("Main", (nn.Linear,), {"__module__": "__main__"})
    for number, kind in enumerate([Local, script]):
        folder = audits.nonfinite(kind(2, 2), torch.full((3, 2), nan)).save(tmp_path / str(number))
        assert note_of(folder)["model"]["class"] == ""
        with pytest.raises(ValueError, match="does not say where its model can be imported from"):
            audits.replay(folder)
        assert audits.replay(folder, kind(2, 2)).reproduced


def test_a_bundle_of_a_model_in_half_precision_comes_back_in_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).half()
    model[0].weight.data.fill_(1.0)
    x = torch.full((3, 4), 6e4).half()
    report = audits.nonfinite(model, x)
    assert report.origin == "operation"
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    again = audits.replay(report.save(tmp_path / "half"), other)
    assert again.reproduced
    assert other[0].weight.dtype is torch.float16
