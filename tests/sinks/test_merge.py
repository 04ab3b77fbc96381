import pytest

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope.sinks import Jsonl, read


def write(path, rank, deliveries, *, run="a", world_size=2, shards=()):
    sink = Jsonl(path)
    sink.open(Run(run, "2026-01-01T00:00:00+00:00", rank=rank, world_size=world_size, shards=dict(shards)))
    for step, records, findings in deliveries:
        sink.write(step, [record._replace(rank=rank, step=step) for record in records], findings)
    sink.close()


def loss(value):
    return Record("loss", value, 0, source="step")


def test_steps_of_all_ranks_are_one_delivery_in_order(tmp_path):
    write(tmp_path, 0, [(step, [loss(float(step))], []) for step in range(4)])
    write(tmp_path, 1, [(step, [loss(float(step) + 1.0)], []) for step in range(3)])
    assert [(d.step, d.records[0].value) for d in read(tmp_path, rank=None)] == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.0)]


def test_phases_and_logs_of_one_step_are_kept_apart(tmp_path):
    for rank in (0, 1):
        logged = Record("sdr", float(rank), 0, phase="val", source="log")
        seen = Record("activation/rms", 1.0, 0, module="a", phase="val")
        write(tmp_path, rank, [(0, [loss(1.0)], []), (0, [seen], []), (0, [logged], [])])
    kinds = [[(r.name, r.phase, r.rank) for r in d.records] for d in read(tmp_path, rank=None)]
    assert kinds == [[("loss", "train", 0)], [("activation/rms", "val", 0)], [("sdr", "val", 0), ("sdr", "val", 1)]]


def test_the_first_finding_tells_where_it_began(tmp_path):
    write(tmp_path, 0, [(3, [loss(1.0)], []), (4, [], [Finding("nonfinite-loss", "error", "m", "", 4)])])
    write(tmp_path, 1, [(3, [], [Finding("nonfinite-loss", "error", "m", "", 3, rank=1)]), (4, [loss(1.0)], [])])
    found = [(f.step, f.rank) for d in read(tmp_path, rank=None) for f in d.findings]
    assert found == [(3, 1), (4, 0)]


def test_a_finding_that_was_passed_on_to_rank_0_is_read_once(tmp_path):
    finding = Finding("nonfinite-loss", "error", "m", "", 3, rank=1)
    write(tmp_path, 0, [(3, [loss(1.0)], []), (5, [], [finding])])
    write(tmp_path, 1, [(3, [loss(1.0)], [finding])])
    assert [f for d in read(tmp_path, rank=None) for f in d.findings] == [finding]
    (tmp_path / "records.rank1.jsonl").unlink()
    assert [f for d in read(tmp_path, rank=None) for f in d.findings] == [finding]


def test_a_whole_is_made_of_its_parts_and_not_when_one_is_missing(tmp_path):
    part = Record("parameter/shard_norm", 3.0, 0, module="w")
    write(tmp_path, 0, [(0, [part], []), (1, [part], [])], shards={"": 2})
    write(tmp_path, 1, [(0, [part._replace(value=4.0)], [])], shards={"": 2})
    whole, left = read(tmp_path, rank=None)
    assert [(r.name, r.value) for r in whole.records] == [("parameter/norm", 5.0)]
    assert [(r.name, r.value) for r in left.records] == [("parameter/shard_norm", 3.0)]


def test_ranks_of_an_earlier_larger_run_in_the_same_folder_are_left_out(tmp_path):
    for rank in range(4):
        write(tmp_path, rank, [(0, [loss(100.0)], [])], run="old", world_size=4)
    for rank in range(2):
        write(tmp_path, rank, [(0, [loss(1.0)], [])], run="new", world_size=2)
    assert [d.records[0].value for d in read(tmp_path, rank=None)] == [1.0]


def test_one_rank_alone_is_read_as_it_is(tmp_path):
    write(tmp_path, 0, [(0, [loss(1.0), Record("activation/max", 2.0, 0)], [])], world_size=1)
    (one,), (other,) = read(tmp_path), read(tmp_path, rank=None)
    assert one == other


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="No records"):
        list(read(tmp_path / "none", rank=None))
