"""A trainer is killed in the middle and its program is run again: one run, each step once, in whatever it is written to."""

import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from stethoscope import sinks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIGHTNING = """
import os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from stethoscope import sinks
from stethoscope.integrations.lightning import MonitorCallback
torch.set_num_threads(1)
folder, kill = Path(sys.argv[1]), sys.argv[2] == "kill"

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        if kill and self.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

to = [sinks.Jsonl(folder / "run"), sinks.TensorBoard(folder / "tb")]
if sys.argv[3] == "wandb":
    import wandb
    to.append(wandb.init(mode="offline", dir=str(folder), id="one", resume="allow", settings=wandb.Settings(console="off")))
data = DataLoader(TensorDataset(torch.randn(80, 6, generator=torch.Generator().manual_seed(0))), batch_size=4)
trainer = L.Trainer(
    callbacks=[MonitorCallback(sinks=to, every=2), ModelCheckpoint(folder, every_n_train_steps=4, save_last=True)],
    max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
last = folder / "last.ckpt"
trainer.fit(Net(), data, ckpt_path=last if last.exists() else None)
"""

HUGGING_FACE = """
import os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from transformers import Trainer, TrainingArguments
from stethoscope import sinks
from stethoscope.integrations.huggingface import MonitorTrainerCallback
torch.set_num_threads(1)
folder, kill = Path(sys.argv[1]), sys.argv[2] == "kill"

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def forward(self, x, labels):
        if kill and trainer.state.global_step == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        logits = self.body(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

to = [sinks.Jsonl(folder / "run"), sinks.TensorBoard(folder / "tb")]
if sys.argv[3] == "wandb":
    import wandb
    to.append(wandb.init(mode="offline", dir=str(folder), id="one", resume="allow", settings=wandb.Settings(console="off")))
generator = torch.Generator().manual_seed(0)
data = [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 2)} for i in range(80)]
arguments = TrainingArguments(
    str(folder / "checkpoints"), per_device_train_batch_size=4, num_train_epochs=1, save_strategy="steps", save_steps=4,
    report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(Net(), arguments, train_dataset=data, callbacks=[MonitorTrainerCallback(sinks=to, every=2)])
trainer.train(resume_from_checkpoint=any((folder / "checkpoints").glob("checkpoint-*")))
"""


def run(program, folder, *arguments):
    command = [sys.executable, "-c", program, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def steps_in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if tag.rpartition("/")[2] == "loss"]
    return [event.step for event in events.Scalars(tag)]


def steps_in_wandb(folder):
    """Steps of the rows with a loss, of each file; the file of a killed process ends where the service had got to."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(Path(folder).rglob("*.wandb")):
        data, place, message, steps = path.read_bytes(), 7, b"", []
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            message += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(message)
                items = {each.key or "/".join(each.nested_key): each.value_json for each in record.history.item}
                if any(name.endswith("/loss") for name in items):
                    steps.append(int(float(items["stethoscope/step"])))
                message = b""
        found.append(steps)
    return found


@pytest.mark.parametrize("to", ["files", "wandb"])
@pytest.mark.parametrize("program", [LIGHTNING, HUGGING_FACE], ids=["lightning", "huggingface"])
def test_a_trainer_that_is_killed_and_resumed_writes_one_run_with_each_step_once(program, to, tmp_path):
    pytest.importorskip("lightning" if program is LIGHTNING else "transformers")
    pytest.importorskip("tensorboard")
    if to == "wandb":
        pytest.importorskip("wandb")
    killed = run(program, tmp_path, "kill", to)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = sinks.read_run(tmp_path / "run").id
    resumed = run(program, tmp_path, "go on", to)
    assert resumed.returncode == 0, resumed.stderr
    assert "part-disabled" not in resumed.stderr
    facts = sinks.read_run(tmp_path / "run")
    assert (facts.id, facts.resumed_from) == (before, 11)
    steps = [d.step for d in sinks.read(tmp_path / "run") for r in d.records if r.name == "loss"]
    assert steps == list(range(20))
    assert steps_in_tensorboard(tmp_path / "tb") == list(range(20))
    if to == "wandb":
        first, second = steps_in_wandb(tmp_path)
        assert second == list(range(12, 20))
        assert first == list(range(len(first)))  # W&B's service writes blocks of 32 KiB, and dies with the process
