"""What any rank finds reaches the user, with its rank; files of a rank that was killed can be read."""

import io
import json
import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stethoscope import Monitor, _reduce, sinks, watches
from stethoscope.sinks import read, read_run


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def spoilt(rank, step, *, on=1, at=3):
    x = torch.randn(4, 7)
    if rank == on and step == at:
        x[2, 3] = torch.nan
    return x


def train(rank, folder, *, parallel, steps=8, on=1, every=2):
    """Train with a NaN in one rank's batch."""
    model = DistributedDataParallel(net()) if parallel else net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    console, called = io.StringIO(), []
    monitor = Monitor(
        model,
        optimizer,
        watches=[watches.NonFinite()],
        sinks=[folder, sinks.Console(console)],
        every=every,
        on_finding=lambda finding: called.append((finding.code, finding.rank, finding.step)),
    )
    with monitor:
        for step in range(steps):
            loss = model(spoilt(rank, step, on=on)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            torch.distributed.barrier()  # as in any training of several ranks
    found = [(finding.code, finding.rank, finding.step) for finding in monitor.findings]
    return {"found": found, "called": called, "printed": console.getvalue(), "id": monitor._run.id}


def alone(rank, folder):
    return train(rank, folder, parallel=False)


def test_rank_0_is_healthy_and_tells_what_rank_1_has_found(two, tmp_path):
    first, second = two.run(alone, folder=str(tmp_path))
    expected = ["nonfinite-activation", 1, 3]
    assert expected in first["found"]
    assert expected in first["called"]
    assert "rank 1" in first["printed"]
    assert expected in second["found"]
    # and each file holds it
    for rank in (0, 1):
        codes = [(f.code, f.rank, f.step) for _, _, findings in read(tmp_path, rank=rank) for f in findings]
        assert tuple(expected) in codes


def healthy(rank, folder):
    return train(rank, folder, parallel=True, on=99)


def test_healthy_ranks_share_a_name_and_only_rank_0_prints(two, tmp_path):
    first, second = two.run(healthy, folder=str(tmp_path))
    assert first["id"] == second["id"] == read_run(tmp_path, rank=1).id
    assert "no findings" in first["printed"]
    assert second["printed"] == ""
    assert first["found"] == second["found"] == []


def spreading(rank, folder):
    return train(rank, folder, parallel=True, on=3)


@pytest.mark.slow
def test_of_a_fault_on_all_ranks_the_first_is_told_and_not_each(four, tmp_path):
    answers = four.run(spreading, folder=str(tmp_path))
    first = answers[0]["found"]
    assert ["nonfinite-activation", 3, 3] in first
    # from step 4 on the weights are spoilt everywhere: rank 0 says so for itself, and not three times more
    assert len([found for found in first if found[2] == 4]) <= 2
    merged = [finding for delivery in read(tmp_path, rank=None) for finding in delivery.findings]
    assert (merged[0].step, merged[0].rank, merged[0].code) == (3, 3, "nonfinite-activation")
    assert {finding.rank for finding in merged} == {0, 1, 2, 3}


def killed(rank, folder):
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    failed = ""
    _reduce.WAIT_S = 1.0  # for the rank that is gone
    try:
        with Monitor(model, optimizer, watches=[watches.NonFinite()], sinks=folder, every=2, reduce=True) as monitor:
            for step in range(20):
                if rank == 1 and step == 10:
                    time.sleep(0.2)  # milliseconds are on their way to the file
                    os.kill(os.getpid(), signal.SIGKILL)
                loss = model(torch.randn(4, 7)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
    except RuntimeError as error:
        failed = str(error)
    return [failed, [finding.code for finding in monitor.findings]]


def test_after_a_rank_was_killed_the_files_of_both_can_be_read(new_world, tmp_path):
    world = new_world(2)
    began = time.monotonic()
    world.start(killed, folder=str(tmp_path))
    failed, _ = world.answer(0)
    assert failed  # torch's own: the connection is closed
    assert world.ranks[1].wait(10) == -signal.SIGKILL
    for rank in (0, 1):
        steps = [d.step for d in read(tmp_path, rank=rank) for record in d.records if record.name == "loss"]
        assert steps == list(range(10))
        assert read_run(tmp_path, rank=rank).world_size == 2
        lines = (tmp_path / f"records{'.rank1' if rank else ''}.jsonl").read_bytes().splitlines()
        assert all(json.loads(line) for line in lines)
    assert [d.step for d in read(tmp_path, rank=None) if any(r.name == "loss" for r in d.records)] == list(range(10))
    assert time.monotonic() - began < 120  # with the start of both processes; torch itself waits for half an hour
