"""Records of all ranks become one; what the ranks do not agree on stays per rank and stops nobody."""

import copy
import gc
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stethoscope import Monitor, _reduce, presets, probes, sinks, watches

PROBES = (
    probes.Activations(),
    probes.Gradients(),
    probes.Parameters(),
    probes.Density(block=(1, 1)),
    probes.Inputs(),
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def batches(world_size, steps=3, size=4):
    for step in range(steps):
        x = torch.randn(world_size * size, 7, generator=torch.Generator().manual_seed(step))
        yield x, x.chunk(world_size)


def train(model, data, **arguments):
    """Train and return what a memory sink holds, by name, module and step."""
    memory = sinks.Memory()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, sinks=memory, every=1, strict=True, **arguments) as monitor:
        for x in data:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return memory, monitor


def numbers(memory):
    return {
        f"{record.name} {record.module} {record.step}": record.value
        for record in memory.records
        if isinstance(record.value, float)
    }


def against_one_process(rank, model, reduce):
    """What the ranks record together, and what one process records of the same training with all the data."""
    world_size = torch.distributed.get_world_size()
    whole = numbers(train(net(), [x for x, _ in batches(world_size)], probes=PROBES)[0])
    mine = [parts[rank] for _, parts in batches(world_size)]
    memory, monitor = train(model, mine, probes=PROBES, reduce=reduce)
    return {
        "whole": whole,
        "ours": numbers(memory),
        "findings": [finding.code for finding in monitor.findings],
        "counts": sum(sum(r.value.counts) for r in memory.records if r.kind == "histogram"),
    }


def ddp(rank, reduce=True):
    return against_one_process(rank, DistributedDataParallel(net()), reduce)


def compare(answers, prefixes):
    first = answers[0]
    assert [answer["findings"] for answer in answers] == [[] for _ in answers]
    names = [name for name in first["whole"] if name.startswith(prefixes)]
    assert names
    for name in names:
        assert first["ours"][name] == pytest.approx(first["whole"][name], rel=1e-4, abs=1e-6), name


def test_ddp_reduced_records_are_those_of_the_whole_batch(two):
    answers = two.run(ddp)
    compare(answers, ("activation/", "parameter/", "density/", "input/mean", "input/rms", "input/absmax"))
    # what all ranks have in common is written once
    assert {name.split()[0] for name in answers[1]["ours"]} == {"loss", "lr", "activation/outermost_nonfinite"}


@pytest.mark.parametrize("reduce", [None, False])
def test_ddp_without_reduction_keeps_each_rank_apart(two, reduce):
    answers = two.run(ddp, reduce=reduce)
    assert answers[0]["ours"].keys() == answers[1]["ours"].keys()
    assert answers[0]["ours"]["activation/rms 0 0"] != answers[1]["ours"]["activation/rms 0 0"]


def sharded(mesh=None):
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(rank, reduce=None):
    return against_one_process(rank, sharded(), reduce)


def test_fsdp_norms_and_densities_are_those_of_the_whole_by_default(two):
    answers = two.run(fsdp)
    first = answers[0]
    compare(answers, ("gradient/", "parameter/norm", "parameter/unchanged", "density/elements", "density/blocks"))
    ratios = [name for name in first["whole"] if name.startswith("parameter/update_ratio")]
    assert ratios
    for name in ratios:  # against the norm after the step, not the larger one
        assert first["ours"][name] == pytest.approx(first["whole"][name], rel=1e-2), name
    assert not [name for answer in answers for name in answer["ours"] if "shard" in name]


def test_fsdp_without_reduction_says_that_norms_are_those_of_a_part(two):
    answers = two.run(fsdp, reduce=False)
    first, second = (answer["ours"] for answer in answers)
    assert "parameter/norm 0.weight 1" not in first
    parts = first["parameter/shard_norm 0.weight 1"], second["parameter/shard_norm 0.weight 1"]
    assert math.hypot(*parts) == pytest.approx(answers[0]["whole"]["parameter/norm 0.weight 1"], rel=1e-5)


def hybrid(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return against_one_process(rank, sharded(mesh), None)


@pytest.mark.slow
def test_hsdp_counts_each_part_once_though_several_ranks_hold_it(four):
    compare(four.run(hybrid), ("gradient/", "parameter/norm", "density/elements"))


@pytest.mark.slow
def test_fsdp_on_more_ranks_than_some_parameters_have_rows(four):
    compare(four.run(fsdp), ("gradient/", "parameter/norm", "parameter/unchanged", "density/elements"))


@pytest.mark.slow
def test_ddp_on_four_ranks(four):
    compare(four.run(ddp), ("activation/", "parameter/", "density/", "input/rms"))


# -- the ranks do not agree ----------------------------------------------------------------------------------------------


def loop(rank, monitor, model, optimizer, steps=12):
    for step in range(steps):
        loss = model(torch.randn(4, 7)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step(loss=loss)
        yield step


def outcome(monitor, memory, began):
    return {
        "findings": [(finding.code, finding.rank, finding.evidence.get("reason")) for finding in monitor.findings],
        "said": [finding.message for finding in monitor.findings],
        "steps": sorted({record.step for record in memory.records if record.name == "activation/rms"}),
        "losses": sum(record.name == "loss" for record in memory.records),
        "seconds": time.monotonic() - began,
    }


def other_steps(rank, sharding=False):
    model = sharded() if sharding else DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory, began = sinks.Memory(), time.monotonic()
    every = 2 if rank else 3
    kinds = (probes.Activations(), probes.Parameters())
    with Monitor(
        model, optimizer, probes=kinds, sinks=memory, every=every, reduce=None if sharding else True
    ) as monitor:
        for _ in loop(rank, monitor, model, optimizer):
            pass
    return outcome(monitor, memory, began)


@pytest.mark.parametrize("sharding", [False, True])
def test_ranks_that_observe_different_steps_neither_wait_nor_lose_a_record(two, sharding):
    first, second = two.run(other_steps, sharding=sharding)
    assert [first["losses"], second["losses"]] == [12, 12]
    assert first["steps"] == [0, 3, 6, 9]
    # steps 0 and 6 are common to both: rank 0 has written them for all
    assert second["steps"] == ([0, 2, 4, 6, 8, 10] if sharding else [2, 4, 8, 10])
    assert ("ranks-not-reduced", 0, "differ") in [tuple(each) for each in first["findings"]]
    assert sharding or "Another rank has closed its monitor" in second["said"][-1]  # it was alone with step 10
    assert max(first["seconds"], second["seconds"]) < 20


def validating(rank):
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory, began = sinks.Memory(), time.monotonic()
    arguments = {"probes": [probes.Activations()], "sinks": memory, "every": 3, "reduce": True}
    with Monitor(model, optimizer, **arguments) as monitor:
        for step in loop(rank, monitor, model, optimizer, steps=16):
            if rank == 0 and step % 5 == 4:
                with monitor.phase("val"), torch.no_grad():
                    model.module(torch.randn(4, 7))
    training = {r.step for r in memory.records if r.name == "activation/rms" and r.phase == "train"}
    return outcome(monitor, memory, began) | {"training": sorted(training)}


def test_a_validation_on_rank_0_alone_costs_no_step_of_the_training(two):
    first, second = two.run(validating)
    assert first["training"] == [0, 3, 6, 9, 12, 15]
    assert second["training"] == []  # all were combined, so rank 0 has written them
    assert first["steps"] == [0, 3, 4, 6, 9, 12, 14, 15]
    assert [tuple(each) for each in first["findings"]] == [("ranks-not-reduced", 0, "differ")]
    assert max(first["seconds"], second["seconds"]) < 10


def late(rank):
    """Rank 1 is late for step 2, and rank 0 writes a checkpoint meanwhile."""
    _reduce.WAIT_S, usual = 0.2, _reduce.WAIT_S
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory, took = sinks.Memory(), []
    with Monitor(model, optimizer, probes=[probes.Activations()], sinks=memory, every=1, reduce=True) as monitor:
        for step in range(6):
            torch.distributed.barrier()
            if rank == 1 and step == 2:
                time.sleep(1)
            loss = model(torch.randn(4, 7)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            began = time.monotonic()
            monitor.step(loss=loss)
            took.append(time.monotonic() - began)
            if step == 2:
                monitor.state_dict()
    _reduce.WAIT_S = usual
    return outcome(monitor, memory, 0) | {"worst": max(took), "severities": [f.severity for f in monitor.findings]}


def test_a_rank_that_is_late_costs_the_steps_that_others_could_not_wait_for(two):
    first, second = two.run(late)
    assert first["steps"] == list(range(6))
    assert 2 in second["steps"]  # its own, as rank 0 has its own there
    assert 5 not in second["steps"]  # combined again
    assert [first["losses"], second["losses"]] == [6, 6]
    assert {*first["severities"], *second["severities"]} <= {"info"}
    assert max(first["worst"], second["worst"]) < 0.5


def bad_while_late(rank):
    """Rank 1 meets a NaN in a step for whose records it has to wait for rank 0."""
    model, memory, told = net(), sinks.Memory(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"probes": [probes.Activations()], "watches": [watches.NonFinite()], "every": 1, "reduce": True}
    with Monitor(
        model, optimizer, **arguments, sinks=memory, on_finding=lambda found: told.append(found.code)
    ) as monitor:
        for step in range(4):
            torch.distributed.barrier()
            if rank == 0 and step == 2:
                time.sleep(0.5)
            spoilt = torch.full((4, 7), torch.nan if rank == 1 and step == 2 else 1.0)
            loss = model(spoilt).square().mean()
            monitor.step(loss=loss)
            if step == 2:
                at_once = list(told)
    return {
        "at_once": at_once,
        "found": [(f.code, f.rank, f.step) for f in monitor.findings],
        "written": [(f.code, f.rank, f.step) for f in memory.findings],
        "rms": [r.step for r in memory.records if r.name == "activation/rms" and r.module == "0"],
    }


def test_a_nan_is_told_in_its_step_however_late_other_ranks_are(two):
    first, second = two.run(bad_while_late)
    assert second["at_once"] == ["nonfinite-activation"]
    assert second["found"] == second["written"] == [["nonfinite-activation", 1, 2]]
    assert first["found"] == [["nonfinite-activation", 1, 2]]
    assert first["at_once"] == []
    assert [first["rms"], second["rms"]] == [[0, 1, 2, 3], []]  # and is combined all the same


def one_more(rank):
    model, memory = net(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, probes=[probes.Activations()], sinks=memory, every=1, reduce=True) as monitor:
        for _ in loop(rank, monitor, model, optimizer, steps=4 + rank):
            pass
    return outcome(monitor, memory, 0) | {"severities": [f.severity for f in monitor.findings]}


def test_a_rank_with_one_step_more_keeps_it_and_nobody_is_warned(two):
    first, second = two.run(one_more)
    assert first["steps"] == [0, 1, 2, 3]
    assert second["steps"] == [4]
    assert first["findings"] == []
    assert second["severities"] == ["info"]


def only_one_has_a_monitor(rank):
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if rank:
        for _ in range(80):
            loss = model(torch.randn(4, 7)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return None
    _reduce.WAIT_S, usual = 0.5, _reduce.WAIT_S
    memory, began = sinks.Memory(), time.monotonic()
    with Monitor(model, optimizer, probes=[probes.Parameters()], sinks=memory, every=1) as monitor:
        for _ in loop(rank, monitor, model, optimizer, steps=80):
            pass
    _reduce.WAIT_S = usual
    return outcome(monitor, memory, began)


def test_a_monitor_on_rank_0_alone_gives_up_on_the_others_and_goes_on(two):
    first, _ = two.run(only_one_has_a_monitor)
    assert [tuple(each) for each in first["findings"]] == [("ranks-not-reduced", 0, "stopped")]
    assert "only 1 of the ranks take part" in first["said"][0]
    assert first["losses"] == 80
    assert first["seconds"] < 10


def destroyed(rank):
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory, began = sinks.Memory(), time.monotonic()
    with Monitor(model, optimizer, probes=[probes.Activations()], sinks=memory, every=1, reduce=True) as monitor:
        for _ in loop(rank, monitor, model, optimizer):
            pass
        torch.distributed.destroy_process_group()
        for _ in loop(rank, monitor, model.module, optimizer, steps=2):
            pass
    return outcome(monitor, memory, began)


def test_a_process_group_that_is_destroyed_early_stops_nothing(two):
    first, second = two.run(destroyed)
    assert first["findings"] == second["findings"] == []
    assert first["steps"] == list(range(14))
    assert max(first["seconds"], second["seconds"]) < 10


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x, first):
        return (self.a if first else self.b)(x)


def unused(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = sinks.Memory()
    with Monitor(model, optimizer, **presets.first_aid(), sinks=memory, every=1, reduce=True) as monitor:
        for step in range(4):
            loss = model(torch.randn(4, 7), first=step % 2 == 0 or bool(rank)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return {
        "findings": [finding.code for finding in monitor.findings],
        "modules": sorted({(r.step, r.rank, r.module) for r in memory.records if r.name == "activation/rms"}),
    }


def test_branches_that_differ_between_ranks_are_kept_per_rank_in_those_steps_alone(two):
    first, second = two.run(unused)
    assert first["findings"] == ["ranks-not-reduced"]
    assert second["findings"] == []
    assert [1, 0, "b"] in first["modules"]
    assert [1, 1, "a"] in second["modules"]
    assert [2, 1, "a"] not in second["modules"]  # combined again


def uneven(rank):
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory, began = sinks.Memory(), time.monotonic()
    every_step = {"probes": [probes.Activations()], "sinks": memory, "every": 1, "reduce": True}
    with Monitor(model, optimizer, **every_step) as monitor, Join([model]):
        for _ in loop(rank, monitor, model, optimizer, steps=3 + 4 * rank):
            pass
    return outcome(monitor, memory, began)


def test_uneven_inputs_do_not_hang(two):
    first, second = two.run(uneven)
    assert first["steps"] == [0, 1, 2]
    assert [first["losses"], second["losses"]] == [3, 7]
    assert second["steps"] == [3, 4, 5, 6]  # alone: its own records; before, rank 0 has written those of both
    assert max(first["seconds"], second["seconds"]) < 25


def without_gloo(rank):
    model = sharded()
    real, torch.distributed.is_gloo_available = torch.distributed.is_gloo_available, lambda: False
    try:
        memory, monitor = train(model, [torch.randn(4, 7)] * 2, probes=[probes.Parameters()])
    finally:
        torch.distributed.is_gloo_available = real
    return [sorted({record.name for record in memory.records}), [str(finding) for finding in monitor.findings]]


def test_without_gloo_each_rank_keeps_its_part_and_says_so(two):
    for names, findings in two.run(without_gloo):
        assert "parameter/shard_norm" in names
        assert "parameter/norm" not in names
        assert len(findings) == 1
        assert "has no gloo" in findings[0]


def untouched(rank):
    """Weights and random state with a monitor that combines everything, and without."""
    ends = []
    for observed in (False, True):
        torch.manual_seed(rank)
        model = DistributedDataParallel(copy.deepcopy(net()))
        torch.manual_seed(rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        arguments = presets.first_aid() if observed else {}
        with Monitor(model, optimizer, **arguments, every=1, reduce=observed) as monitor:
            for _ in loop(rank, monitor, model, optimizer, steps=4):
                pass
        ends.append([*(p.sum().item() for p in model.parameters()), torch.get_rng_state().sum().item()])
    return ends


def test_training_on_two_ranks_is_left_as_it_is(two):
    for plain, observed in two.run(untouched):
        assert plain == observed


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def connections(rank):
    counts = []
    for _ in range(4):
        train(DistributedDataParallel(net()), [torch.randn(4, 7)] * 2, probes=PROBES, reduce=True)
        gc.collect()
        until = time.monotonic() + 5  # gloo closes its sockets in a thread
        while counts[1:] and open_files() > counts[1] and time.monotonic() < until:
            time.sleep(0.01)
        counts.append(open_files())
    return counts


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux does")
def test_closed_monitors_leave_no_connections(two):
    for counts in two.run(connections):
        assert counts[-1] <= counts[1], counts


def test_a_limit_on_the_overhead_and_a_reduction_are_refused_together():
    with pytest.raises(ValueError, match="same steps on all ranks"):
        Monitor(net(), reduce=True, overhead="1%")


def limited(rank):
    memory, monitor = train(sharded(), [torch.randn(4, 7)] * 3, probes=[probes.Parameters()], overhead="50%")
    return [sorted({record.name for record in memory.records}), [finding.code for finding in monitor.findings]]


def test_with_a_limit_on_the_overhead_each_rank_keeps_its_part(two):
    for names, findings in two.run(limited):
        assert "parameter/shard_norm" in names
        assert findings == []


def fails():
    raise ValueError("of the user's")


def ends_by_an_error(rank):
    """Rank 0 has sent its step and fails; rank 1 never comes to it, and sleeps."""
    model, memory, began = net(), sinks.Memory(), 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _reduce.WAIT_S, usual = 30.0, _reduce.WAIT_S
    try:
        with Monitor(model, optimizer, probes=[probes.Activations()], sinks=memory, every=1, reduce=True) as monitor:
            for _ in loop(rank, monitor, model, optimizer, steps=3):
                torch.distributed.barrier()
            if rank:
                time.sleep(4)
            else:
                monitor.step(loss=model(torch.randn(4, 7)).sum())
                began = time.monotonic()
                fails()
    except ValueError:
        took = time.monotonic() - began
    finally:
        _reduce.WAIT_S = usual
    return outcome(monitor, memory, 0) | {"took": took if rank == 0 else 0.0}


def test_a_rank_that_ends_by_an_error_hands_over_what_it_holds_back_and_waits_for_nobody(two):
    first, _ = two.run(ends_by_an_error)
    assert first["steps"] == [0, 1, 2, 3]
    assert first["losses"] == 4
    assert first["took"] < 0.5 + 2 + 1  # and two seconds for last words of rank 1


def slow_steps(rank):
    """Rank 1 stands still for a while after three steps, and rank 0 goes on, slowly."""
    _reduce.MAX_WAIT_S, usual = 0.5, _reduce.MAX_WAIT_S
    model, memory = net(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    oldest = 0
    with Monitor(model, optimizer, probes=[probes.Activations()], sinks=memory, every=1, reduce=True) as monitor:
        for step, _ in enumerate(loop(rank, monitor, model, optimizer, steps=12)):
            if rank and step == 3:
                torch.distributed.barrier()  # until rank 0 is through
            if not rank and step > 3:
                time.sleep(0.2)
                written = [r.step for r in memory.records if r.name == "loss"]
                oldest = max(oldest, step - max(written, default=0))
        if not rank:
            torch.distributed.barrier()
    _reduce.MAX_WAIT_S = usual
    said = [f.message for f in monitor.findings if f.evidence.get("reason") == "late"]
    return outcome(monitor, memory, 0) | {"oldest": oldest, "late": said}


def test_however_few_deliveries_there_are_none_is_held_back_for_longer_than_a_minute(two):
    first, second = two.run(slow_steps)
    assert first["oldest"] <= 4  # at 0.2 s each, half a second and the store's answer
    assert [first["losses"], second["losses"]] == [12, 12]
    assert "more than one delivery and 0.5 s behind" in first["late"][0]
