"""An error of ours in anything that a trainer calls: it trains as if we were not there, and it is said once."""

import inspect
import logging
import sys

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from stethoscope import FindingsError, sinks  # noqa: E402
from stethoscope.integrations.huggingface import MonitorTrainerCallback  # noqa: E402
from stethoscope.integrations.lightning import MonitorCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def called_by_the_trainer(kind):
    own = {name for name, each in vars(kind).items() if inspect.isfunction(each)}
    return sorted(
        name for name in own if name.startswith("on_") or name in {"setup", "teardown", "state_dict", "state"}
    )


NO_MONITOR = {
    "setup",
    "on_fit_start",
    "on_train_begin",
    "on_exception",
    "on_test_start",
    "teardown",
    "on_predict",
    "state",
}
"""When these fail first, no monitor is open: the log says it alone."""


class Fault:
    """Raises at the first line of a method of ours, at each call."""

    def __init__(self, kind, name, error):
        method = inspect.unwrap(getattr(kind, name))
        if name in {"state", "state_dict"}:
            method = inspect.unwrap(kind._save)
        self.code, self.error, self.calls = method.__code__, error, 0

    def __call__(self, frame, event, arg):
        if frame.f_code is not self.code:
            return
        self.calls += 1
        raise self.error("injected")

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layers(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder, *callbacks):
    model = Net()
    data = DataLoader(
        TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(0))), batch_size=4, shuffle=True
    )
    trainer = L.Trainer(
        callbacks=list(callbacks),
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, data, data)
    trainer.test(model, data, verbose=False)
    return model


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(folder, *callbacks):
    model, generator = Tiny(), torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 2)} for i in range(32)]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.predict(data)
    return model


TRAINERS = {MonitorCallback: fit, MonitorTrainerCallback: train}
CALLS = [(kind, name) for kind in TRAINERS for name in called_by_the_trainer(kind)]


@pytest.fixture(scope="module")
def unobserved(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("stethoscope"), "disabled", True)
        return {kind: run(tmp_path_factory.mktemp("twin")) for kind, run in TRAINERS.items()}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(("kind", "name"), CALLS, ids=[f"{kind.__name__}.{name}" for kind, name in CALLS])
def test_an_error_of_ours_in_a_callback_never_reaches_the_trainer(kind, name, unobserved, tmp_path, caplog):
    memory = sinks.Memory()
    callback = kind(sinks=memory, every=2)
    with Fault(kind, name, RuntimeError) as fault:
        model = TRAINERS[kind](tmp_path, callback)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unobserved[kind].parameters(), strict=True))
    assert hooks(model) == 0
    if name != "on_exception":
        assert fault.calls == 1
        assert caplog.text.count("has failed and observes nothing from here on") == 1
        assert "RuntimeError: injected" in caplog.text
    said = [f.message for f in memory.findings if f.code == "part-disabled"]
    assert len(said) == (name not in NO_MONITOR)
    assert all(text.startswith(f"The integration {kind.__name__} failed with RuntimeError: injected") for text in said)


class Failing:
    """A probe of the user's that cannot be attached."""

    every = 1

    def attach(self, model):
        raise LookupError("no such module")

    def covers(self, other):
        return False


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_is_meant_for_the_user_still_stops_the_training(kind, tmp_path):
    with pytest.raises(LookupError, match="no such module"):
        TRAINERS[kind](tmp_path, kind(probes=[Failing()], sinks=()))


def test_what_a_guard_raises_still_stops_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Net, "training_step", lambda self, batch, _: self.layers(batch[0]).sum() * float("nan"))
    with pytest.raises(FindingsError):
        fit(tmp_path, MonitorCallback(guard="raise", sinks=()))
