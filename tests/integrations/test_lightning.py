import csv
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stethoscope import FindingsError, audits, presets, probes, sinks, watches
from stethoscope._protocols import Probe, Sink, Watch
from stethoscope.integrations.lightning import MonitorCallback

pytestmark = [
    # advice for real trainings: more workers, longer epochs, a validation loader
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"),
]


def loader(batches=8, shuffle=False):
    x = torch.randn(batches * 4, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=shuffle)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.raw = []

    def loss(self, batch):
        x, y = batch
        return (self.layers(x) - y).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.raw.append(loss.item())
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), on_step=True, on_epoch=True)
        self.log("loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Gan(Net):
    def __init__(self, accumulate=1):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(6, 1)
        self.accumulate = accumulate

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for i, (optimizer, net) in enumerate([(first, self.layers), (second, self.other)]):
            loss = net(batch[0]).mean() * 0 + (i + 1)
            self.manual_backward(loss)
            if (batch_idx + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.layers.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.2)]


def fit(model, *callbacks, train=None, val=None, ckpt_path=None, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **(defaults | options))
    trainer.fit(model, loader() if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


def hooks(model):
    found = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    found += [len(p._backward_hooks or ()) for p in model.parameters()]
    found += [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return sum(found)


def test_one_batch_is_one_step_with_its_loss_and_learning_rate():
    model, memory = Net(), sinks.Memory()
    fit(model, MonitorCallback(sinks=memory, every=2))
    steps = [r for r in memory.records if r.source == "step"]
    assert [r.value for r in steps if r.name == "loss"] == pytest.approx(model.raw)
    assert [r.step for r in steps if r.name == "lr"] == list(range(8))
    assert [r.value for r in steps if r.name == "plan/steps"] == [8.0]
    activations = {r.step for r in memory.records if r.name == "activation/rms" and r.module == "layers.0"}
    assert activations == {0, 2, 4, 6}


def test_an_audit_at_the_start_of_the_fit_reaches_the_sinks_and_no_record():
    class Audited(Net):
        audited = True

        def on_fit_start(self):
            x = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
            if self.audited:
                callback.monitor.add(audits.causality(lambda x: self.layers(x.flip(1)), x, time_axis=1))

    found = {}
    for audited in (True, False):
        torch.manual_seed(0)
        model, memory = Audited(), sinks.Memory()
        model.audited = audited
        callback = MonitorCallback(sinks=memory, every=1)
        fit(model, callback)
        codes = [(finding.code, finding.phase) for finding in memory.findings if finding.code == "causality-leak"]
        assert codes == ([("causality-leak", "eval"), ("causality-leak", "train")] if audited else [])
        found[audited] = [
            (r.name, r.module, r.step, r.value) for r in memory.records if r.name.startswith("activation")
        ]
    assert found[True] == found[False]
    assert found[True]


def test_accumulated_batches_are_one_step_and_the_loss_is_the_mean_of_what_training_step_returned():
    model, memory = Net(), sinks.Memory()
    callback = MonitorCallback(None, sinks=memory)
    fit(model, callback, train=loader(10), accumulate_grad_batches=4)
    loss = [r.value for r in memory.records if r.name == "loss" and r.source == "step"]
    means = [sum(window) / len(window) for window in (model.raw[:4], model.raw[4:8], model.raw[8:])]
    assert loss == pytest.approx(means)
    assert [r.value for r in memory.records if r.name == "plan/steps"] == [3.0]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_manual_optimisation_with_two_optimizers_is_one_step_for_both(accumulate):
    memory = sinks.Memory()
    fit(Gan(accumulate=accumulate), MonitorCallback(sinks=memory))
    steps = [r for r in memory.records if r.source == "step"]
    by_name = {name: [(r.step, r.value) for r in steps if r.name == name] for name in ("loss", "loss/1", "lr", "lr/1")}
    expected = {"loss": 1.0, "loss/1": 2.0, "lr": 0.1, "lr/1": 0.2}
    assert by_name == {name: [(step, value) for step in range(8 // accumulate)] for name, value in expected.items()}


def test_unwrapped_optimizers_that_lightning_does_not_count_are_reported(caplog):
    class Unwrapped(Gan):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=False)

    fit(Unwrapped(), MonitorCallback(None))
    assert "use_pl_optimizer=False" in caplog.text


def test_loss_scaling_of_mixed_precision_is_undone():
    from lightning.pytorch.plugins import MixedPrecision

    model, memory = Net(), sinks.Memory()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    fit(model, MonitorCallback(None, sinks=memory), plugins=[plugin])
    assert [r.value for r in memory.records if r.name == "loss" and r.source == "step"] == pytest.approx(model.raw)


def test_the_learning_rate_is_the_one_that_the_step_was_made_with(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    memory, logger = sinks.Memory(), CSVLogger(tmp_path)
    fit(Scheduled(), LearningRateMonitor("step"), MonitorCallback(None, sinks=memory), logger=logger)
    with Path(logger.experiment.metrics_file_path).open() as file:
        theirs = [(int(row["step"]), float(row["lr-SGD"])) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert [(r.step, pytest.approx(r.value)) for r in memory.records if r.name == "lr"] == theirs


def test_validation_is_a_phase_of_its_own_with_its_own_metrics():
    model, memory = Net(), sinks.Memory()
    trainer = fit(
        model,
        MonitorCallback(sinks=memory, every=1),
        val=loader(3),
        max_epochs=2,
        val_check_interval=4,
        num_sanity_val_steps=2,
    )
    logged = [(r.step, r.phase, r.name) for r in memory.records if r.source == "log"]
    val = [(step, "val", name) for step in (3, 7, 11, 15) for name in ("val/loss", "loss")]
    train = [(step, "train", name) for step in (7, 15) for name in ("train/loss", "loss")]
    assert Counter(logged) == Counter(val + train)
    own = [r.value for r in memory.records if (r.source, r.phase, r.name) == ("log", "train", "loss")]
    assert own == pytest.approx([sum(model.raw[:8]) / 8, sum(model.raw[8:]) / 8], rel=1e-5)
    seen = {r.step for r in memory.records if r.phase == "val" and r.name == "activation/rms"}
    assert seen == {3, 7, 11, 15}
    assert trainer.callback_metrics["val/loss"] == [r.value for r in memory.records if r.name == "val/loss"][-1]
    assert all(r.kind == "tensor" for r in memory.records if r.source == "log")


def test_metrics_that_were_not_logged_again_are_not_repeated():
    class Once(Net):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 0:
                self.log("first_epoch_only", 1.0, on_epoch=True)
                self.log("own_epoch", 1.0, on_step=True)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                self.log("second_epoch_only", 1.0)

    memory = sinks.Memory()
    fit(Once(), MonitorCallback(None, sinks=memory), val=loader(2), max_epochs=3)
    logged = [(r.step, r.phase, r.name) for r in memory.records if r.source == "log"]
    assert sorted(logged) == [
        (7, "train", "first_epoch_only"),
        (7, "train", "own_epoch"),
        (15, "val", "second_epoch_only"),
    ]


def test_sanity_check_is_not_recorded():
    memory = sinks.Memory()
    fit(Net(), MonitorCallback(sinks=memory), val=loader(3), num_sanity_val_steps=3, limit_train_batches=0)
    assert memory.records == []


def test_validation_losses_of_several_loaders_keep_the_names_of_lightning():
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val/loss", self.loss(batch), on_step=True, on_epoch=True)

    memory = sinks.Memory()
    fit(Two(), MonitorCallback(None, sinks=memory), val=[loader(2), loader(2)])
    names = [r.name for r in memory.records if r.phase == "val" and r.source == "log"]
    assert names == ["val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"]


def test_test_and_validate_go_on_with_the_run_that_was_fitted():
    model, memory = Net(), sinks.Memory()
    callback = MonitorCallback(sinks=memory)
    trainer = fit(model, callback)
    run = callback.state_dict()["run"]
    trainer.test(model, loader(2), verbose=False)
    trainer.validate(model, loader(2), verbose=False)
    assert callback.state_dict()["run"] == run
    assert callback.state_dict()["step"] == 8
    logged = [(r.step, r.phase, r.name) for r in memory.records if r.source == "log" and r.phase != "train"]
    assert logged == [(7, "test", "test/loss"), (7, "val", "val/loss"), (7, "val", "loss")]
    assert {r.phase for r in memory.records if r.name == "activation/rms"} == {"train", "test", "val"}
    assert hooks(model) == 0


def test_test_alone_needs_no_fit():
    model, memory = Net(), sinks.Memory()
    trainer = L.Trainer(
        callbacks=[MonitorCallback(sinks=memory)], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    trainer.test(model, loader(2), verbose=False)
    assert {(r.step, r.phase) for r in memory.records} == {(0, "test")}
    assert hooks(model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_before_zero_grad"])
def test_an_exception_anywhere_leaves_no_hook_and_delivers_what_was_measured(where, error, monkeypatch):
    model, memory = Net(), sinks.Memory()

    def fail(*args):
        model.layers(torch.ones(4, 6))
        if model.trainer.global_step >= 3 and not model.trainer.sanity_checking:
            raise error("in the middle")
        return model.loss(args[0]) if where == "training_step" else None

    monkeypatch.setattr(model, where, fail)
    callback = MonitorCallback(sinks=memory, every=1)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(model, callback, val=loader(2), val_check_interval=4)
    assert hooks(model) == 0
    assert {r.step for r in memory.records if r.name == "lr"} >= {0, 1, 2}
    assert ("val" in {r.phase for r in memory.records}) == (where == "validation_step")
    assert callback.monitor.findings == []


def test_a_fit_after_a_failed_validation_starts_outside_of_the_phase():
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                raise RuntimeError("once")

    memory = sinks.Memory()
    callback = MonitorCallback(sinks=memory, every=1)
    with pytest.raises(RuntimeError, match="once"):
        fit(Fails(), callback, val=loader(2))
    memory.records.clear()
    fit(Net(), callback)
    assert {r.phase for r in memory.records} == {"train"}
    assert [r.step for r in memory.records if r.name == "lr"] == list(range(8))


def test_fitting_on_with_the_same_trainer_goes_on_and_a_new_trainer_is_a_new_run():
    model, memory = Net(), sinks.Memory()
    callback = MonitorCallback(sinks=memory)
    trainer = fit(model, callback)
    first = callback.state_dict()["run"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert callback.state_dict()["run"] == first
    assert [r.step for r in memory.records if r.name == "lr"] == list(range(16))
    fit(model, callback)
    assert callback.state_dict()["run"] != first
    assert [r.step for r in memory.records if r.name == "lr"] == [*range(16), *range(8)]
    assert hooks(model) == 0


@pytest.mark.parametrize("model", [Net, Gan])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_in_the_middle_of_an_epoch_goes_on_with_steps_and_run(tmp_path, model):
    def saving():
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=5 if model is Net else 10, save_top_k=-1)

    first = MonitorCallback(sinks=str(tmp_path / "run"), every=2)
    fit(model(), first, saving(), enable_checkpointing=True)
    checkpoint = next(iter(tmp_path.glob("*.ckpt")))
    second = MonitorCallback(sinks=str(tmp_path / "run"), every=2)
    fit(model(), second, saving(), enable_checkpointing=True, ckpt_path=checkpoint)
    assert second.state_dict()["run"] == first.state_dict()["run"]
    run = sinks.read_run(tmp_path / "run")
    assert run.resumed_from == 4
    steps = [r.step for delivery in sinks.read(tmp_path / "run") for r in delivery.records if r.name == "lr"]
    assert sorted(steps) == list(range(8))


@pytest.mark.parametrize("model", [Net, Gan])
def test_resuming_a_run_that_was_not_observed_starts_at_lightnings_step(tmp_path, model):
    trainer = fit(model())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    memory = sinks.Memory()
    fit(model(), MonitorCallback(None, sinks=memory), ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert [r.step for r in memory.records if r.name == "lr"] == list(range(8, 16))


def test_two_callbacks_with_different_arguments_live_side_by_side_in_a_checkpoint(tmp_path):
    several = [
        MonitorCallback(),
        MonitorCallback(every=10),
        MonitorCallback(None, watches=[watches.NonFinite()]),
        MonitorCallback(sinks=[sinks.Memory()]),
        MonitorCallback(sinks=str(tmp_path / "a")),
    ]
    assert len({each.state_key for each in several}) == len(several)
    trainer = fit(Net(), *several)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert all(saved[each.state_key]["step"] == 8 for each in several)


def test_state_key_is_the_same_in_another_process():
    one, other = [MonitorCallback(None, sinks=sinks.Logger(CSVLogger("."))) for _ in range(2)]
    assert one.state_key == other.state_key
    assert "0x" not in one.state_key


def test_several_loggers_get_the_numbers_with_our_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    fit(Net(), MonitorCallback(every=4), logger=loggers, val=loader(2))
    events = EventAccumulator(loggers[1].log_dir, size_guidance={"scalars": 0, "histograms": 0}).Reload()
    series = "stethoscope_activation/rms/layers.0"
    assert [event.step for event in events.Scalars(series)] == [0, 4]
    assert [event.step for event in events.Scalars("stethoscope_step/loss")] == list(range(8))
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row.get(series)] == [0, 4]
    assert any(row.get("stethoscope_val/val/loss") for row in rows)


def test_a_second_fit_and_a_test_write_on_through_the_same_logger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, callback, logger = Net(), MonitorCallback(every=4), TensorBoardLogger(tmp_path)
    trainer = fit(model, callback, logger=logger)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    trainer.test(model, loader(2), verbose=False)
    assert callback.monitor.findings == []
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("stethoscope_step/loss")] == list(range(16))
    assert [event.step for event in events.Scalars("stethoscope_activation_test/rms/layers.0")] == [15]


def test_fast_dev_run_writes_nothing_and_observes_all_the_same():
    model, callback = Net(), MonitorCallback()
    trainer = fit(model, callback, val=loader(2), fast_dev_run=2, logger=True)
    assert [type(each).__name__ for each in trainer.loggers] == ["DummyLogger"]
    assert callback.state_dict()["step"] == 2
    assert hooks(model) == 0


def test_without_loggers_findings_still_reach_logging(caplog):
    class Bad(Net):
        def loss(self, batch):
            return super().loss(batch) * float("nan")

    callback = MonitorCallback()
    fit(Bad(), callback)
    assert "nonfinite-loss" in {finding.code for finding in callback.monitor.findings}
    assert "nonfinite-loss" in caplog.text


def train(*callbacks):
    L.seed_everything(1, verbose=False)
    model = Net()
    fit(model, *callbacks, train=loader(20, shuffle=True), val=loader(3))
    others = torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)  # what users use
    return [*model.state_dict().values(), torch.get_rng_state(), torch.tensor(model.raw), others]


def test_the_training_is_the_same_bit_for_bit():
    alone, observed = train(), train(MonitorCallback(every=1, sinks=sinks.Memory()))
    assert all(torch.equal(a, b) for a, b in zip(alone, observed, strict=True))


def test_what_the_user_gives_goes_before_the_preset():
    mine = probes.Activations(every=7)
    callback = MonitorCallback(probes=[mine], watches=[watches.NonFinite()])
    assert [p for p in callback._options["probes"] if isinstance(p, probes.Activations)] == [mine]
    assert len(callback._options["watches"]) == len(presets.first_aid()["watches"])


def test_mistakes_are_reported_at_once():
    with pytest.raises(ValueError, match=r"Unknown preset 'first-aid'. Known: \[.*'first_aid'.*\]; None"):
        MonitorCallback("first-aid")
    with pytest.raises(TypeError, match="parentheses"):
        MonitorCallback(probes=[probes.Activations])
    with pytest.raises(ValueError, match="every"):
        MonitorCallback(every=0)
    with pytest.raises(TypeError, match="Cannot write"):
        MonitorCallback(sinks=[3])


def test_accumulation_that_changes_is_followed_and_has_no_plan():
    model, memory = Net(), sinks.Memory()
    changing = GradientAccumulationScheduler({0: 2, 1: 4})
    fit(model, MonitorCallback(None, sinks=memory), changing, max_epochs=2)
    windows = [model.raw[i : i + 2] for i in range(0, 8, 2)] + [model.raw[8:12], model.raw[12:]]
    loss = [r.value for r in memory.records if r.name == "loss" and r.source == "step"]
    assert loss == pytest.approx([sum(window) / len(window) for window in windows])
    assert [r for r in memory.records if r.name == "plan/steps"] == []


def test_an_optimizer_that_evaluates_the_loss_several_times_makes_one_step_per_batch():
    class Quasi(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    model, memory = Quasi(), sinks.Memory()
    fit(model, MonitorCallback(sinks=memory), train=loader(3))
    assert len(model.raw) > 3
    assert [(r.name, r.step) for r in memory.records if r.source == "step" and "loss" in r.name] == [
        ("loss", step) for step in range(3)
    ]


def test_a_training_step_that_returns_none_is_a_step_without_a_loss():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else {"loss": self.loss(batch)}

    memory = sinks.Memory()
    callback = MonitorCallback(sinks=memory)
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(Skips(), callback)
    assert [r.step for r in memory.records if r.name == "loss" and r.source == "step"] == [0, 2, 4, 6]
    assert callback.state_dict()["step"] == 8


def poisoned(at=3):
    batches = [[x.clone() for x in batch] for batch in loader()]
    batches[at][0][1] = torch.nan
    return DataLoader(batches, batch_size=None)


def test_the_guard_skips_a_bad_batch_and_names_it():
    model, memory = Net(), sinks.Memory()
    fit(model, MonitorCallback(sinks=memory, guard="skip"), train=poisoned())
    assert all(p.isfinite().all() for p in model.parameters())
    (found,) = [f for f in memory.findings if f.code == "nonfinite-input"]
    assert (found.step, found.evidence["samples"]) == (3, [1])
    assert [r.step for r in memory.records if r.name == "guard/skipped"] == [3, 4, 5, 6, 7]
    assert hooks(model) == 0


def test_the_guard_stops_before_the_weights_are_spoilt():
    model = Net()
    with pytest.raises(FindingsError, match="Samples of the batch: 1"):
        fit(model, MonitorCallback(guard="raise"), train=poisoned())
    assert all(p.isfinite().all() for p in model.parameters())
    assert hooks(model) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_gradient_clipping_the_guilty_parameter_is_named_and_the_step_kept(tmp_path, accumulate):
    model = Net()
    model.layers[3].weight.register_hook(lambda grad: grad * torch.nan if len(model.raw) in (5, 6) else grad)
    callback = MonitorCallback(sinks=[str(tmp_path)], guard="skip")
    fit(model, callback, gradient_clip_val=0.5, accumulate_grad_batches=accumulate)
    assert all(p.isfinite().all() for p in model.parameters())
    found = next(f for f in callback.monitor.findings if f.severity == "error")
    assert (found.code, found.module, found.step) == ("nonfinite-gradient", "layers.3", 4 // accumulate)
    assert found.evidence["parameter"] == "layers.3.weight"
    assert len(found.evidence["gradients_at_write"]) == 4
    assert (tmp_path / "incidents" / f"step{found.step}" / "incident.json").is_file()
    assert hooks(model) == 1  # the one of this test


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_incidents_go_to_the_folder_of_the_trainers_logger(tmp_path, kind):
    logger = kind(tmp_path, name="runs", version="a")
    fit(Net(), MonitorCallback(guard="skip"), train=poisoned(), logger=logger)
    note = json.loads((tmp_path / "runs" / "a" / "incidents" / "step3" / "incident.json").read_text())
    assert note["culprit"]["samples"] == [1]
    assert note["batches"]


def test_a_test_of_its_own_has_nothing_to_guard():
    callback = MonitorCallback(guard="raise")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    trainer.test(Net(), loader(), verbose=False)
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        MonitorCallback(guard="stop")


def test_a_model_without_known_length_has_no_plan():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (loader().dataset[i] for i in range(32))

    memory = sinks.Memory()
    fit(Net(), MonitorCallback(None, sinks=memory), train=DataLoader(Endless(), batch_size=4))
    assert [r for r in memory.records if r.name == "plan/steps"] == []
    assert len([r for r in memory.records if r.name == "loss" and r.source == "step"]) == 8


class Flat(Net):
    """Calls its layers one by one, as many do, and never itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(6, 4)
        self.more = nn.ModuleList([nn.Linear(4, 1)])

    def loss(self, batch):
        return (self.more[0](self.layers(batch[0])) - batch[1]).square().mean()


def test_a_module_that_is_never_called_itself_is_observed_through_its_layers():
    callback = MonitorCallback()
    fit(Flat(), callback)
    assert callback.monitor.findings == []


@pytest.mark.parametrize("layer", ["layers", "more.0"])
def test_a_bad_weight_is_found_where_only_layers_are_called(layer):
    class Breaks(Flat):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                self.get_submodule(layer).weight.data[0, 0] = float("nan")

    callback = MonitorCallback()
    fit(Breaks(), callback)
    first = callback.monitor.findings[0]
    assert (first.code, first.step) == ("nonfinite-parameter", 3)
    assert first.module.startswith(layer)


class Count(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        assert hooks(pl_module) > 0


def test_the_model_is_observed_while_it_trains():
    fit(Net(), MonitorCallback(), Count())


PARTS = [
    (protocol, part)
    for protocol, package in ((Probe, probes), (Watch, watches), (Sink, sinks))
    for part in vars(package).values()
    if isinstance(part, type) and hasattr(part, {Probe: "attach", Watch: "update", Sink: "open"}[protocol])
]


@pytest.mark.parametrize(("protocol", "part"), PARTS)
def test_every_part_is_accepted_by_the_parser_of_lightning_cli(protocol, part):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=protocol)
    said = ""
    try:
        parser.parse_object({"part": {"class_path": f"{part.__module__}.{part.__name__}"}})
    except ArgumentError as error:
        said = str(error)
    # where an argument without a default is missing, the class itself was accepted
    assert not said or ("required" in said and "does not implement protocol" not in said)


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_pytorch_lightning_takes_the_callback_as_well(tmp_path):
    import pytorch_lightning as P
    from pytorch_lightning.loggers import CSVLogger as OtherLogger

    class Other(P.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 1)

        def training_step(self, batch, batch_idx):
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(callback, **options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = P.Trainer(callbacks=[callback], accelerator="cpu", accumulate_grad_batches=2, **quiet, **options)
        trainer.fit(model, loader(), ckpt_path=tmp_path / "a.ckpt" if (tmp_path / "a.ckpt").exists() else None)
        return trainer

    model, first, logger = Other(), MonitorCallback(every=2), OtherLogger(tmp_path)
    fit(first, max_epochs=1, logger=logger).save_checkpoint(tmp_path / "a.ckpt")
    assert "stethoscope_activation/rms/net" in (Path(logger.log_dir) / "metrics.csv").read_text()
    second = MonitorCallback(every=2)
    fit(second, max_epochs=2, logger=False)
    assert second.state_dict()["step"] == 8
    assert second.state_dict()["run"] == first.state_dict()["run"]
    assert hooks(model) == 0


CLI_CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: stethoscope.integrations.lightning.MonitorCallback
      init_args:
        preset: first_aid
        every: 1
        probes:
          - class_path: stethoscope.probes.Gradients
            init_args:
              every: 1
              include: "layers.*"
        watches:
          - class_path: stethoscope.watches.NonFinite
        sinks:
          - class_path: stethoscope.sinks.Jsonl
            init_args:
              path: {run}
          - {more}
"""


class Fed(Net):
    def train_dataloader(self):
        return loader(2)


# Lightning's use of jsonargparse, and how that writes tuples to YAML
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:\\s+Dump of a value that does not round-trip")
def test_lightning_cli_builds_the_callback_from_class_path_and_init_args(tmp_path, capsys, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CLI_CONFIG.format(run=tmp_path / "a", more=tmp_path / "b.jsonl"))
    cli = LightningCLI(Fed, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    callback = next(each for each in cli.trainer.callbacks if isinstance(each, MonitorCallback))
    assert callback.state_dict()["step"] == 2
    for path in ("a", "b.jsonl"):
        records = [record for delivery in sinks.read(tmp_path / path) for record in delivery.records]
        assert {"activation/rms", "gradient/norm", "loss"} <= {record.name for record in records}
    with pytest.raises(SystemExit):
        LightningCLI(
            Fed, args=["fit", "--trainer.callbacks.help", "stethoscope.integrations.lightning.MonitorCallback"]
        )
    assert "optimizer steps that the run will make" in " ".join(capsys.readouterr().out.split())


SCRIPT = """
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return self.layers(batch[0]).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 6)), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

cli = LightningCLI(Tiny, save_config_callback=None)
callback = next(each for each in cli.trainer.callbacks if type(each).__name__ == "MonitorCallback")
assert isinstance(callback, Callback)
print("steps", callback.monitor.state_dict()["step"])
"""


def test_where_pytorch_lightning_is_in_use_its_cli_takes_the_callback(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(CLI_CONFIG.format(run=tmp_path / "a", more=tmp_path / "b.jsonl"))
    command = [sys.executable, "script.py", "fit", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps 2" in done.stdout


def test_what_the_module_logs_at_the_end_of_the_epoch_belongs_to_that_epoch():
    class AtTheEnd(Net):
        def on_train_epoch_end(self):
            self.log("train/late", float(self.current_epoch + 1))

    memory = sinks.Memory()
    fit(AtTheEnd(), MonitorCallback(None, sinks=memory), max_epochs=3)
    logged = [(r.step, r.value) for r in memory.records if r.source == "log" and r.name == "train/late"]
    assert logged == [(7, 1.0), (15, 2.0), (23, 3.0)]


def test_a_name_that_training_logs_per_step_and_validation_as_well_is_taken_from_each():
    class Shared(Net):
        def training_step(self, batch, batch_idx):
            self.log("loss", float(batch_idx))
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("loss", 100.0)

    memory = sinks.Memory()
    fit(Shared(), MonitorCallback(None, sinks=memory), val=loader(2), max_epochs=2)
    logged = [(r.phase, r.value) for r in memory.records if r.source == "log"]
    assert logged == [("val", 100.0), ("train", 7.0)] * 2


@pytest.mark.parametrize("order", ["callback", "module"])
def test_audits_at_the_start_of_a_fit_reach_the_run(tmp_path, order):
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in Net().state_dict().items()}}, tmp_path / "a.ckpt"
    )
    callback = MonitorCallback(sinks=tmp_path / "run")

    def audit(trainer, module):
        schedule = audits.Schedule("sparsify", start=2500, stop=8000, interval=50)
        callback.monitor.add(audits.plan(schedule, trainer.estimated_stepping_batches))
        callback.monitor.add(audits.checkpoint(module, tmp_path / "a.ckpt"))

    class Audits(Callback):
        def on_fit_start(self, trainer, pl_module):
            audit(trainer, pl_module)

    class Audited(Net):
        def on_fit_start(self):
            audit(self.trainer, self)

    callbacks = [callback, Audits()] if order == "callback" else [callback]
    net = Net() if order == "callback" else Audited()
    fit(net, *callbacks, train=loader(8), max_epochs=2, accumulate_grad_batches=4)
    written = [finding for delivery in sinks.read(tmp_path / "run") for finding in delivery.findings]
    for findings in (callback.monitor.findings, written):
        assert [each.code for each in findings if each.severity == "error"] == [
            "schedule-unreachable",
            "checkpoint-prefix",
        ]
    assert callback.monitor.findings[0].evidence["planned_steps"] == 4


@pytest.mark.parametrize("automatic", [True, False])
def test_answers_that_training_step_returns_reach_the_probes(automatic):
    class Answers(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            x, y = batch
            answers = self.layers(x)
            loss = (answers - y).square().mean()
            if not automatic:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return {"loss": loss, "outputs": answers, "targets": y, "epoch": 3, "scale": torch.ones(())}

    memory = sinks.Memory()
    callback = MonitorCallback(None, probes=[probes.Agreement(every=1)], sinks=[memory])
    fit(Answers(), callback)
    assert len([r for r in memory.records if r.name == "answer/concordance"]) == 8
    assert {r.name for r in memory.records if r.source == "step"} == {"plan/steps", "loss", "lr"}
