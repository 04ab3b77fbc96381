"""torch.compile inside of frameworks: read in observed steps, compiled as often as without a monitor, the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from stethoscope import Monitor, presets, sinks

pytestmark = [
    # advice for real trainings, and what frameworks and the compiler use of torch
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def weights(model):
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def observed_steps(memory):
    return sorted({r.step for r in memory.records if r.name == "activation/rms" and r.phase == "train"})


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("way", ["module", "in place", "net"])
def test_lightning_trains_a_compiled_module_to_the_same_bits(way):
    lightning = pytest.importorskip("lightning.pytorch")
    from stethoscope.integrations.lightning import MonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            self(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(*callbacks):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = Module()
        fitted = torch.compile(model, backend="aot_eager") if way == "module" else model
        if way == "in place":
            model.compile(backend="aot_eager")
        elif way == "net":
            model.net = torch.compile(model.net, backend="aot_eager", fullgraph=True)
        trainer = lightning.Trainer(
            max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(callbacks), val_check_interval=4, num_sanity_val_steps=0,
        )  # fmt: skip
        data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        trainer.fit(fitted, loader, loader)
        return weights(model), counters["stats"]["unique_graphs"]

    memory = sinks.Memory()
    plain, graphs = fit()
    seen, seen_graphs = fit(MonitorCallback(sinks=[memory], every=3))
    assert torch.equal(plain, seen)
    assert seen_graphs == graphs
    assert observed_steps(memory) == [0, 3, 6]
    modules = {r.module for r in memory.records if r.name == "activation/rms"}
    assert modules >= {"", "net", "net.0", "net.3"} if way != "net" else modules >= {"net", "net.0", "net.3"}


@pytest.mark.slow
def test_hugging_faces_trainer_with_torch_compile_trains_to_the_same_bits(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from stethoscope.integrations.huggingface import MonitorTrainerCallback

    data = [{"input_ids": torch.arange(i, i + 8) % 64, "labels": torch.arange(i, i + 8) % 64} for i in range(32)]

    def fit(callback):
        torch._dynamo.reset()
        counters.clear()
        model = gpt2()
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
            torch_compile=True, torch_compile_backend="aot_eager", disable_tqdm=True, eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])
        trainer.remove_callback(transformers.PrinterCallback)
        if callback is not None:
            callback.attach(trainer)
        trainer.train()
        return weights(model), counters["stats"]["unique_graphs"]

    memory = sinks.Memory()
    plain, graphs = fit(None)
    seen, seen_graphs = fit(MonitorTrainerCallback(sinks=[memory], every=3))
    assert torch.equal(plain, seen)
    assert seen_graphs == graphs
    assert observed_steps(memory) == [0, 3, 6]


@pytest.mark.slow
def test_gpt2_is_compiled_as_often_as_without_a_monitor_and_trains_to_the_same_bits():
    def train(observed):
        torch._dynamo.reset()
        counters.clear()
        model, memory = gpt2(), sinks.Memory()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        compiled = torch.compile(model, backend="aot_eager")
        monitor = (
            Monitor(model, optimizer, **presets.full(), every=4, sinks=[memory], strict=True) if observed else None
        )
        generator, graphs = torch.Generator().manual_seed(1), []
        for _ in range(9):
            ids = torch.randint(0, 64, (4, 12), generator=generator)
            loss = compiled(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if monitor is not None:
                monitor.step(loss=loss)
            graphs.append(counters["stats"].get("unique_graphs", 0))
        if monitor is not None:
            monitor.close()
        return weights(model), graphs, memory

    plain, graphs, _ = train(observed=False)
    seen, seen_graphs, memory = train(observed=True)
    assert torch.equal(plain, seen)
    assert seen_graphs[1:] == graphs[1:]
    assert observed_steps(memory) == [0, 4, 8]
    assert not [each for each in memory.findings if each.severity != "info"]
