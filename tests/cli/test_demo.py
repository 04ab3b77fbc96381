import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from stethoscope import Finding, sinks
from stethoscope.cli import _demo, _demo_faults, app


def demo(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy") / "demo"
    state = torch.get_rng_state()
    result = demo("--steps", 8, "--every", 4, "--out", folder)
    return result, folder, torch.equal(state, torch.get_rng_state())


def test_a_healthy_run_ends_with_layers_gains_and_no_findings(healthy):
    result, _, _ = healthy
    assert result.exit_code == 0, result.output
    for words in ("masker.blocks.2.conv", "no findings", "SI-SDR improvement", "tensorboard --logdir"):
        assert words in result.output


def test_everything_measured_is_in_the_run_folder(healthy):
    _, folder, _ = healthy
    records = [record for delivery in sinks.read(folder) for record in delivery.records]
    assert [record.step for record in records if record.name == "loss"] == list(range(8))
    assert {record.step for record in records if record.name == "gradient/norm"} == {0, 4}
    assert {record.phase for record in records if record.name == "activation/rms"} == {"train", "val"}
    assert len([record for record in records if record.name == "si_sdri_db"]) == 1 + 8  # before training, and 8 times
    assert list(folder.glob("events.out.tfevents.*"))


def test_the_random_numbers_of_the_process_are_left_alone(healthy):
    assert healthy[2]


def test_a_planted_nan_is_found_where_and_when_it_is_born(tmp_path, caplog):
    result = demo("--steps", 8, "--every", 5, "--fault", "nan", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    findings = [finding for delivery in sinks.read(tmp_path / "demo") for finding in delivery.findings]
    assert [(each.code, each.module, each.step, each.cause) for each in findings] == [
        ("nonfinite-activation", "masker.norm", 5, ""),
        ("output-nonfinite", "", 5, "nonfinite-activation"),
    ]
    assert "in masker.norm at step 5" in result.output
    assert "stethoscope demo --steps 8 --every 5 --seed 0 --fault nan" in result.output
    assert result.output.count("Try:") == 2  # once per finding
    assert not any(isinstance(each, Finding) for record in caplog.records for each in record.args or ())


def test_a_sparsification_that_never_begins_is_found_before_the_run_and_at_its_end(tmp_path):
    result = demo("--steps", 8, "--every", 5, "--fault", "sparsity", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    deliveries = list(sinks.read(tmp_path / "demo"))
    findings = [finding for delivery in deliveries for finding in delivery.findings]
    assert [(each.code, each.step) for each in findings] == [("schedule-unreachable", None), ("sparsity-missed", None)]
    assert "4.0 times as many" in findings[1].message
    assert [record.step for each in deliveries for record in each.records if record.name == "loss"] == list(range(8))
    assert "schedule-unreachable before the training" in result.output


def test_the_planted_sparsifier_works_where_it_acts():
    training, _ = _demo._prepare(10, 0)
    _demo_faults.FAULTS["sparsity"].plant(training)
    training.sparsify(19)
    assert not training.after[0]().ok
    training.sparsify(60)
    assert training.after[0]().ok


def test_a_model_that_looks_further_ahead_than_it_promises_is_found_before_the_training(tmp_path):
    result = demo("--steps", 8, "--fault", "causal", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    deliveries = sinks.read(tmp_path / "demo")
    assert [(each.code, each.module) for one in deliveries for each in one.findings] == [
        ("causality-leak", "masker.norm")
    ]
    assert not [record for one in deliveries for record in one.records if record.name == "loss"]
    assert "in masker.norm before the training" in result.output


def test_a_renamed_metric_is_found_before_the_first_step(tmp_path):
    result = demo("--steps", 8, "--fault", "metric", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    findings = [finding for delivery in sinks.read(tmp_path / "demo") for finding in delivery.findings]
    (missing, unexpected) = findings
    assert (missing.code, missing.phase, missing.evidence["nearest"]) == ("metric-missing", "val", "si_sdr_i_db")
    assert (unexpected.code, unexpected.step) == ("metric-unexpected", 0)


def found(folder):
    return [finding for delivery in sinks.read(folder) for finding in delivery.findings if finding.severity != "info"]


@pytest.mark.slow
def test_a_loss_without_pit_is_found_by_outputs_that_are_alike(tmp_path):
    result = demo("--steps", 200, "--every", 5, "--fault", "collapse", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    assert "output-collapse" in {finding.code for finding in found(tmp_path / "demo")}


@pytest.mark.slow
def test_a_learning_rate_cut_to_nothing_is_found_as_a_plateau(tmp_path):
    result = demo("--steps", 300, "--fault", "plateau", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    first = found(tmp_path / "demo")[0]
    assert first.code == "loss-plateau"
    assert first.step > 300 // 8  # the cut


def test_outputs_are_measured_in_training_and_in_validation(healthy):
    _, folder, _ = healthy
    records = [record for delivery in sinks.read(folder) for record in delivery.records]
    assert {record.phase for record in records if record.name == "separation/out_cos"} == {"train", "val"}


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    assert _demo._fresh(out) == out
    (out / "records.jsonl").write_text("precious")
    (tmp_path / "demo-2").write_text("a file")
    assert _demo._fresh(out) == tmp_path / "demo-3"


def test_an_unknown_fault_is_answered_with_those_known():
    result = demo("--fault", "typo")
    assert result.exit_code == 2
    assert "nan" in result.output


def test_without_tensorboard_and_wandb_it_runs_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_demo, "find_spec", lambda name: None)
    result = demo("--steps", 2, "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert 'pip install "stethoscope[tensorboard]"' in result.output
    assert [file.name for file in (tmp_path / "demo").iterdir()] == ["records.jsonl"]
    assert demo("--wandb", "--out", tmp_path / "other").exit_code == 2


def test_a_wandb_run_is_written_offline(tmp_path):
    pytest.importorskip("wandb")
    command = [sys.executable, "-m", "stethoscope", "demo", "--steps", "2", "--wandb", "--out", tmp_path / "demo"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True)
    assert "wandb sync" in run.stdout
    assert list((tmp_path / "demo").glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5])
def test_it_learns_to_separate_without_a_finding(tmp_path, seed):
    result = demo("--steps", 400, "--seed", seed, "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    records = [record for delivery in sinks.read(tmp_path / "demo") for record in delivery.records]
    gains = [record.value for record in records if record.name == "si_sdri_db"]
    assert gains[0] < 0 < 2 < gains[-1]  # 0 dB: as good as the mixture itself
