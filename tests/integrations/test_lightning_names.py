"""Names of metrics, judged by the callback in a real Trainer before the first epoch ends."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stethoscope.integrations.lightning import MonitorCallback
from stethoscope.watches import MetricSchema

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric:RuntimeWarning"),
]


TRAIN_ACC, VAL_ACC = "train_acc", "val_acc"  # what stands in quotes in a module counts as logged


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2)

    def step(self, batch, phase):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.body(inputs), targets)
        self.log(f"{phase}_loss", loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self.step(batch, "val")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plateau(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        how = {"scheduler": scheduler, "monitor": "val_los", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": how}


class AtTheEndOfTheEpoch(Net):
    def on_train_epoch_end(self):
        self.log(TRAIN_ACC, 0.5)


class NotInTheSanityCheck(Net):
    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log(VAL_ACC, 0.5)


class AfterTheBatch(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log(TRAIN_ACC, 0.5)


class Early(L.Callback):
    """Keeps what was known when the second training batch began."""

    def __init__(self, watching):
        self.watching, self.found = watching, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, 1):
            self.found = list(self.watching.monitor.findings)


def fit(module, *callbacks, watches=(), val=True, **options):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(2, (32,))), batch_size=8)
    watching = MonitorCallback(None, watches=watches, sinks=())
    early = Early(watching)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watching, *callbacks, early],
        **options,
    )
    trainer.fit(module, data, data if val else None)
    return early.found, watching.monitor.findings


def waiting(key):
    return EarlyStopping(key, strict=False)


def test_keys_that_nothing_logs_are_said_once_and_before_the_second_batch(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{step}-{val_wer:.2f}", monitor="step", mode="max")
    early, found = fit(Plateau(), waiting("val_los"), checkpoint)
    assert early == found
    assert {(each.evidence["who"], each.evidence["metric"]) for each in found} == {
        ("EarlyStopping", "val_los"),
        ("ModelCheckpoint's filename", "val_wer"),
        ("ReduceLROnPlateau", "val_los"),
    }
    assert {each.code for each in found} == {"metric-monitor-unknown"}


def test_it_is_said_before_lightning_stops_also_where_an_epoch_is_one_batch():
    watching = MonitorCallback(None, sinks=())
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(2, (8,))), batch_size=8)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watching, EarlyStopping("val_los")],
    )
    with pytest.raises(RuntimeError, match="val_los"):
        trainer.fit(Net(), data, data)
    assert [each.code for each in watching.monitor.findings] == ["metric-monitor-unknown"]


@pytest.mark.parametrize(
    ("module", "key", "options"),
    [
        (Net(), "val_loss", {}),
        (Net(), "train_loss", {"val": False}),
        (Net(), "val_los", {"num_sanity_val_steps": 0}),
        (AtTheEndOfTheEpoch(), "train_acc", {"val": False}),
        (NotInTheSanityCheck(), "val_acc", {}),
        (AfterTheBatch(), "train_acc", {}),
    ],
    ids=["healthy", "no validation", "no sanity check", "end of epoch", "not in the sanity check", "after the batch"],
)
def test_a_key_that_is_known_or_cannot_be_known_yet_gives_no_alarm(module, key, options):
    assert fit(module, waiting(key), **options) == ([], [])


@pytest.mark.parametrize("key", ["val_loss", "loss"])
def test_without_validation_nobody_logs_its_keys(key):
    early, found = fit(Net(), waiting(key), val=False)
    assert [each.evidence["metric"] for each in early] == [key]
    assert early == found


def test_a_schema_compares_the_first_batch_with_the_sanity_check():
    early, _ = fit(AfterTheBatch(), watches=[MetricSchema()])
    assert [(each.code, each.evidence["metric"]) for each in early] == [("metric-phase-mismatch", "train_acc")]
    early, _ = fit(Net(), watches=[MetricSchema({"loss": float, "acc": float})])
    assert [(each.code, each.phase) for each in early] == [("metric-missing", "val"), ("metric-missing", "train")]


@pytest.mark.parametrize("module", [Net, AtTheEndOfTheEpoch])
def test_a_healthy_declaration_has_nothing_to_say(module):
    declared = {"loss": float} if module is Net else {"loss": float, "train_acc": float}
    assert fit(module(), watches=[MetricSchema(declared)]) == ([], [])
