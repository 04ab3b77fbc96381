"""A guard decides for all ranks: they write in a step, or none of them does."""

import math
import time
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stethoscope import Monitor, _agreement, watches
from stethoscope._record import FindingsError

STEPS, BAD = 5, 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def sharded(net):
    for layer in (net[0], net[3]):
        fully_shard(layer)
    return fully_shard(net)


def outcome(monitor, model, raised, wrote):
    weights = [getattr(each, "full_tensor", lambda each=each: each)().sum().item() for each in model.parameters()]
    return {
        "weights": weights,
        "raised": raised,
        "wrote": wrote,
        "found": [(f.code, f.rank, f.step, f.module) for f in monitor.findings if f.severity == "error"],
        "said": [f.message for f in monitor.findings if f.severity != "info"],
        "advice": [f.advice for f in monitor.findings if f.severity != "info"],
    }


def train(rank, model, *, act, spoil, watched=None, scaler=None, guarded=True, **arguments):
    """Train, where `spoil(rank, step, x, loss)` may change what the guard is shown."""
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    raised, wrote = "", 0
    monitor = Monitor(watched or model, optimizer, guard=act if guarded else None, every=1, **arguments)
    with monitor:
        for step in range(STEPS):
            x = torch.randn(4, 7)
            x, shown = spoil(rank, step, x)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            (scaler.scale(loss) if scaler else loss).backward()
            if guarded:
                monitor.observe(batch=x, loss=loss * shown)
            try:
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                monitor.step(loss=loss * shown)
            except FindingsError as error:
                raised = f"{step}: {error}"
                break
            wrote = step
    return outcome(monitor, model, raised, wrote)


def bad_batch(rank, step, x):
    if rank == 1 and step == BAD:
        x[1, 2] = torch.nan
    return x, 1


def bad_loss(rank, step, x):
    """A loss that is NaN on one rank, whose gradients are finite all the same."""
    return x, (torch.nan if rank == 1 and step == BAD else 1)


def ddp(rank, act, spoil, wrapped=True):
    model = DistributedDataParallel(net())
    return train(rank, model, act=act, spoil=globals()[spoil], watched=None if wrapped else model.module)


def test_the_guard_decides_alike_on_both_ranks_and_rank_1_names_its_batch(two):
    first, second = two.run(ddp, act="skip", spoil="bad_batch")
    assert first["weights"] == second["weights"]
    assert all(map(math.isfinite, first["weights"]))
    assert ["nonfinite-input", 1, BAD, ""] in first["found"]
    assert "look first at what another rank says" in first["advice"][0]  # its own batch was fine


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_loss_that_is_bad_on_one_rank_alone_is_skipped_by_all(two, wrapped):
    first, second = two.run(ddp, act="skip", spoil="bad_loss", wrapped=wrapped)
    assert first["weights"] == second["weights"]
    assert [found[:3] for found in first["found"]] == [["nonfinite-loss", 1, BAD]]  # what rank 1 says, and that alone


def test_a_loss_that_is_bad_on_one_rank_alone_raises_on_all(two):
    first, second = two.run(ddp, act="raise", spoil="bad_loss")
    assert first["raised"].startswith(f"{BAD}: ")
    assert "rank 1" in first["raised"]
    assert "The loss is nan" in second["raised"]
    assert first["weights"] == second["weights"]


def scaled(rank, act):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    return train(rank, DistributedDataParallel(net()), act=act, spoil=bad_batch, scaler=scaler)


@pytest.mark.parametrize("act", ["skip", "raise"])
def test_a_step_that_grad_scaler_skips_ends_alike_on_all_ranks(two, act):
    first, second = two.run(scaled, act=act)
    assert first["weights"] == second["weights"]
    assert bool(first["raised"]) == bool(second["raised"]) == (act == "raise")


def fsdp(rank, act, spoil):
    return train(rank, sharded(net()), act=act, spoil=globals()[spoil])


@pytest.mark.parametrize("spoil", ["bad_batch", "bad_loss"])
def test_sharded_gradients_are_skipped_by_all_ranks(two, spoil):
    first, second = two.run(fsdp, act="skip", spoil=spoil)
    assert first["wrote"] == second["wrote"] == STEPS - 1
    assert first["weights"] == second["weights"]
    assert all(map(math.isfinite, first["weights"]))
    assert (BAD, 1) in [(found[2], found[1]) for found in first["found"]]


def test_sharded_gradients_raise_on_all_ranks(two):
    first, second = two.run(fsdp, act="raise", spoil="bad_batch")
    assert first["raised"].startswith(f"{BAD}: ")
    assert second["raised"].startswith(f"{BAD}: ")
    assert "split over ranks" in second["raised"]
    assert all(map(math.isfinite, first["weights"]))


def on_one_rank_alone(rank):
    _agreement.TIMEOUT, usual = timedelta(seconds=1), _agreement.TIMEOUT
    began = time.monotonic()
    try:
        told = train(rank, DistributedDataParallel(net()), act="raise", spoil=bad_loss, guarded=rank == 0)
    finally:
        _agreement.TIMEOUT = usual
    return told | {"seconds": time.monotonic() - began}


def test_a_guard_on_one_rank_alone_gives_up_and_the_training_goes_on(two):
    first, second = two.run(on_one_rank_alone)
    assert first["wrote"] == second["wrote"] == STEPS - 1
    assert "no common decision within 1 s" in first["said"][0]
    assert "same guard=" in first["said"][0]
    assert first["seconds"] < 10


class Gathers(nn.Module):
    """As a contrastive loss does: asks other ranks in its forward pass."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        y = self.net(x)
        everywhere = [torch.empty_like(y) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everywhere, y.detach())
        return y - torch.stack(everywhere).mean()


def gathering(rank):
    torch.manual_seed(0)
    return train(rank, DistributedDataParallel(Gathers()), act="skip", spoil=bad_batch)


def test_a_step_that_needs_other_ranks_is_not_run_again_alone(two):
    first, second = two.run(gathering)
    assert first["wrote"] == second["wrote"] == STEPS - 1
    assert first["weights"] == second["weights"]
    assert second["found"][0][:3] == ["nonfinite-input", 1, BAD]
    assert not any("run again, the forward pass is finite" in said for said in first["said"]), first["said"]


def independent(rank):
    """Ranks that train models of their own do not wait for each other."""
    torch.manual_seed(rank)
    return train(rank, net(), act="skip", spoil=bad_batch, watches=[watches.NonFinite()])


def test_ranks_that_share_no_gradients_decide_for_themselves(two):
    first, second = two.run(independent)
    assert [found for found in first["found"] if found[1] == 0] == []
    assert second["found"][0][0] == "nonfinite-input"
