"""Metric dictionaries and monitored keys as the real trainers of Lightning and Hugging Face give them."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stethoscope import Record
from stethoscope._metrics import normalise
from stethoscope.integrations import _monitored
from stethoscope.watches import MetricSchema, unknown_monitors

lightning = pytest.importorskip("lightning.pytorch")


class Follower:
    """What an integration does: log what the trainer holds, host values at once."""

    def __init__(self):
        self.schema = MetricSchema()
        self.state, self.found = self.schema.init(), []

    def log(self, metrics, phase, step):
        records = [
            Record(name, None if value is None else float(value), step, phase=phase, source="log", kind=kind)
            for name, value, kind in normalise(metrics)
        ]
        self.state, found = self.schema.update(self.state, records)
        self.found += found


class Listening(lightning.Callback):
    def __init__(self):
        self.follower = Follower()
        self.unknown = None
        self.early = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.follower.log(dict(trainer.callback_metrics), "train", trainer.global_step)
        if self.unknown is None:
            known = _monitored.lightning_known(trainer)
            self.unknown = unknown_monitors(_monitored.lightning(trainer), known)
            self.early = self.follower.schema.compare(known, trainer.global_step)

    def on_validation_end(self, trainer, module):
        self.follower.log(dict(trainer.callback_metrics), "val", trainer.global_step)

    def on_train_epoch_end(self, trainer, module):
        self.follower.log(dict(trainer.callback_metrics), "train", trainer.global_step)


class Module(lightning.LightningModule):
    def __init__(self, plateau="val_loss"):
        super().__init__()
        self.body, self.plateau = nn.Linear(4, 2), plateau

    def step(self, batch, phase, **how):
        inputs, targets = batch
        logits = self.body(inputs)
        loss = nn.functional.cross_entropy(logits, targets)
        self.log(f"{phase}_loss", loss, **how)
        self.log(f"{phase}_acc", (logits.argmax(-1) == targets).float().mean(), on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train", on_step=True, on_epoch=True)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.step(batch, "val")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": self.plateau, "strict": False},
        }


class OnlyInTrain(Module):
    def training_step(self, batch, batch_idx):
        self.log("train_ctc", 1.0)
        return super().training_step(batch, batch_idx)


class Late(Module):
    def on_train_epoch_end(self):
        self.log("train_late", 1.0)


def fit(module, *callbacks, loaders=1, tmp_path=None):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(2, (32,))), batch_size=8)
    listening = Listening()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(hasattr(each, "filename") for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*callbacks, listening],
    )
    trainer.fit(module, data, [data] * loaders)
    return listening


pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric:RuntimeWarning"),
]


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_healthy_lightning_run_has_nothing_to_say(loaders, tmp_path):
    plateau = "val_loss" if loaders == 1 else "val_loss/dataloader_idx_1"
    listening = fit(Module(plateau), loaders=loaders, tmp_path=tmp_path)
    assert listening.follower.found == []
    assert listening.unknown == listening.early == []


def test_the_first_training_batch_is_compared_with_the_sanity_check(tmp_path):
    listening = fit(OnlyInTrain(), tmp_path=tmp_path)
    (found,) = listening.follower.found
    assert (found.code, found.severity, found.step) == ("metric-phase-mismatch", "warning", 1)
    assert found.evidence["metric"] == "train_ctc"
    assert listening.early == [dataclasses.replace(found, phase="train", evidence=listening.early[0].evidence)]


def test_every_key_that_nothing_logs_is_said_after_the_first_batch(tmp_path):
    stopping = lightning.callbacks.EarlyStopping("val_los", strict=False)
    checkpoint = lightning.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}-{step:06d}-{val_wer:.2f}-{train_acc:.1f}", monitor="val_loss"
    )
    late = lightning.callbacks.EarlyStopping("train_late", strict=False)
    listening = fit(Late("val_lss"), stopping, checkpoint, late, tmp_path=tmp_path)
    assert {(finding.evidence["who"], finding.evidence["metric"]) for finding in listening.unknown} == {
        ("EarlyStopping", "val_los"),
        ("ModelCheckpoint's filename", "val_wer"),
        ("ReduceLROnPlateau", "val_lss"),
    }
    assert {finding.evidence.get("nearest") for finding in listening.unknown} == {"val_loss", None}


def test_a_healthy_huggingface_run_has_nothing_to_say(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    follower = Follower()

    class Callback(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            follower.log(logs, "train", state.global_step)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            follower.log(metrics, "val", state.global_step)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, inputs, labels):
            logits = self.body(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    data = [{"inputs": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(32)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        logging_steps=2,
        eval_strategy="epoch",
        save_strategy="no",
        metric_for_best_model="accuracy",
        lr_scheduler_type="reduce_lr_on_plateau",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        Body(),
        args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda given: {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())},
        callbacks=[Callback()],
    )
    trainer.train()
    assert follower.found == []
    asked = _monitored.huggingface(args, [transformers.EarlyStoppingCallback(3)])
    assert asked == [
        ("metric_for_best_model", "eval_accuracy"),
        ("ReduceLROnPlateau", "eval_accuracy"),
        ("EarlyStoppingCallback", "eval_accuracy"),
    ]
    known = {"train": ["loss"], "val": ["eval_loss", "eval_acuracy"]}
    assert [finding.evidence["nearest"] for finding in unknown_monitors(asked, known)] == ["eval_acuracy"] * 3
