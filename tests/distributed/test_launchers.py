"""Launched as users do: torchrun, Lightning's ddp; and tensors that tensor parallelism splits."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from stethoscope import Monitor, presets, probes, sinks
from stethoscope.sinks import read, read_run

ROOT = Path(__file__).parents[2]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


def train(model, data):
    memory = sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, **presets.full(), sinks=memory, every=1) as monitor:
        for x in data:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return {f"{r.name} {r.module} {r.step}": r.value for r in memory.records if isinstance(r.value, float)}, monitor


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(rank):
    data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    torch.manual_seed(0)
    whole, _ = train(Mlp(), data)
    torch.manual_seed(0)
    model = parallelize_module(Mlp(), init_device_mesh("cpu", (torch.distributed.get_world_size(),)), PLAN)
    ours, monitor = train(model, data)
    return [whole, ours, [str(finding) for finding in monitor.findings if finding.severity != "info"]]


def test_tensor_parallelism_gives_the_norms_of_the_whole(two):
    (whole, ours, findings), (_, _, others) = two.run(tensor_parallel)
    assert findings == others == []
    names = [name for name in whole if name.startswith(("parameter/norm", "gradient/norm"))]
    assert names
    for name in names:
        assert ours[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7), name


def both(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    whole, _ = train(Mlp(), [torch.randn(4, 8, generator=torch.Generator().manual_seed(0))] * 2)
    torch.manual_seed(0)
    model = fully_shard(parallelize_module(Mlp(), mesh["tensor"], PLAN), mesh=mesh["data"])
    ours, monitor = train(model, [torch.randn(4, 8, generator=torch.Generator().manual_seed(0))] * 2)
    return [whole, ours, [str(finding) for finding in monitor.findings if finding.severity != "info"]]


@pytest.mark.slow
def test_fsdp_over_tensor_parallelism_gives_the_norms_of_the_whole(four):
    whole, ours, findings = four.run(both)[0]
    assert findings == []
    for name in (name for name in whole if name.startswith(("parameter/norm", "gradient/norm"))):
        assert ours[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-7), name


def moved(rank):
    """A model that moves while it is observed: meta stands in for another device."""
    model = fully_shard(Mlp())
    with Monitor(model, probes=[probes.Parameters(), probes.Gradients(), probes.Density()], every=1) as monitor:
        model(torch.randn(4, 8)).sum().backward()
        monitor.step()
        model.to("meta")
        monitor.step()
    return [finding.code for finding in monitor.findings if finding.severity != "info"]


def test_a_sharded_model_that_is_moved_stops_nothing(two):
    assert len(two.run(moved)) == 2


SCRIPT = """
import sys, torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from stethoscope import Monitor, presets

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
for layer in (model[0], model[2], model):
    fully_shard(layer)
optimizer = torch.optim.Adam(model.parameters())
with Monitor(model, optimizer, **presets.first_aid(), sinks=sys.argv[1], every=5) as monitor:
    for step in range(12):
        x = torch.randn(8, 4)
        if rank == 1 and step == 7:
            x[0, 0] = torch.nan
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step(loss=loss)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun_two_ranks_one_of_which_meets_a_nan(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"nonfinite-\w+ .*on rank 1", done.stderr)
    found = [finding for delivery in read(tmp_path / "run", rank=0) for finding in delivery.findings]
    assert (7, 1) in [(finding.step, finding.rank) for finding in found]
    merged = [finding for delivery in read(tmp_path / "run", rank=None) for finding in delivery.findings]
    assert [(finding.step, finding.rank) for finding in merged].count((7, 1)) == 1
    # on a busy machine what rank 1 has found may be written with a later step
    assert min((finding.step, finding.rank) for finding in merged) == (7, 1)
    norms = [r for d in read(tmp_path / "run") for r in d.records if r.name == "parameter/norm"]
    assert {r.step for r in norms} == {0, 5, 10}
    assert read_run(tmp_path / "run").id == read_run(tmp_path / "run", rank=1).id


LEFT_OPEN = """
import sys, torch
from torch import nn
from stethoscope import Monitor, presets

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
monitor = Monitor(model, **presets.first_aid(), sinks=sys.argv[1], every=1, reduce=True)
for step in range(5):
    x = torch.ones(8, 4) * (torch.nan if (rank, step) == (1, 4) else 1)
    monitor.step(loss=model(x).square().mean())
    torch.distributed.barrier()
if rank == 1:
    raise RuntimeError("the script's own")
"""


@pytest.mark.slow
def test_a_script_that_ends_without_closing_its_monitor_leaves_every_step_and_finding(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LEFT_OPEN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=240, check=False
    )
    assert "the script's own" in done.stderr
    written = {rank: list(read(tmp_path / "run", rank=rank)) for rank in (0, 1)}
    for deliveries in written.values():
        assert [r.step for d in deliveries for r in d.records if r.name == "loss"] == list(range(5))
    assert (4, 1) in [(f.step, f.rank) for d in written[1] for f in d.findings if f.code.startswith("nonfinite")]


LIGHTNING = """
import sys, torch
from lightning.pytorch import LightningModule, Trainer
from stethoscope.integrations.lightning import MonitorCallback

torch.set_num_threads(1)

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def training_step(self, batch, index):
        if self.global_rank == 1 and index == 5:
            batch = batch * torch.nan
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

if __name__ == "__main__":
    callback = MonitorCallback(sinks=sys.argv[1], every=2, reduce=True)
    trainer = Trainer(strategy="ddp", devices=2, accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=4))
"""


@pytest.mark.slow
def test_lightning_ddp_on_two_processes(tmp_path):
    pytest.importorskip("lightning")
    script = tmp_path / "train.py"
    script.write_text(LIGHTNING)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [finding for delivery in read(tmp_path / "run", rank=None) for finding in delivery.findings]
    assert (found[0].step, found[0].rank, found[0].code) == (5, 1, "nonfinite-activation")
    of_rank_0 = [finding.rank for delivery in read(tmp_path / "run") for finding in delivery.findings]
    assert 1 in of_rank_0
    for rank in (0, 1):
        losses = [r.step for d in read(tmp_path / "run", rank=rank) for r in d.records if r.name == "loss"]
        assert losses == list(range(8))
    assert not [r for d in read(tmp_path / "run", rank=1) for r in d.records if r.name == "activation/rms"]


def older_fsdp(rank, orig):
    torch.manual_seed(0)
    model = FullyShardedDataParallel(Mlp(), use_orig_params=orig, device_id=torch.device("cpu"))
    values, monitor = train(model, [torch.randn(4, 8)] * 2)
    norms = [value for name, value in values.items() if name.startswith("parameter/norm") and name.endswith(" 1")]
    return [norms, [(finding.code, finding.severity) for finding in monitor.findings if finding.severity != "info"]]


@pytest.mark.parametrize("orig", [False, True])
def test_flat_shards_of_the_older_fsdp_are_told(two, orig):
    (norms, first), (others, second) = two.run(older_fsdp, orig=orig)
    assert first == [["flat-shards", "warning"]]
    assert second == []
    assert norms != others  # each is of a part
