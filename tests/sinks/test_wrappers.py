import pytest

from stethoscope import Finding, Record
from stethoscope._protocols import Run, Sink
from stethoscope.sinks import Every, Jsonl, Memory, OnRank
from stethoscope.testing import series

FINDING = Finding("nonfinite-loss", "error", "", "", step=1, rank=1)


def run(rank):
    return Run("a", "", rank=rank, world_size=2)


@pytest.mark.parametrize(("rank", "steps"), [(0, [0, 1]), (1, [])])
def test_on_rank_filters_records_by_rank_but_never_findings(rank, steps):
    memory = Memory()
    sink = OnRank(memory)
    sink.open(run(rank))
    sink.write(0, series([0], loss=[1.0]), [])
    sink.write(1, series([1], loss=[1.0]), [FINDING])
    sink.close()
    assert [record.step for record in memory.records] == steps
    assert memory.findings == [FINDING]


def test_on_rank_leaves_no_file_where_a_rank_has_nothing_to_say(tmp_path):
    sink = OnRank(Jsonl(tmp_path))
    sink.open(run(1))
    sink.write(0, series(loss=[1.0]), [])
    assert list(tmp_path.iterdir()) == []
    sink.write(1, [], [FINDING])
    sink.close()
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["records.rank1.jsonl"]


def test_on_rank_before_open_and_after_close_says_so():
    sink = OnRank(Memory())
    with pytest.raises(RuntimeError, match="OnRank is not open"):
        sink.write(0, series(loss=[1.0]), [])
    sink.open(run(0))
    sink.close()
    with pytest.raises(RuntimeError, match="OnRank is not open"):
        sink.write(0, series(loss=[1.0]), [])


def test_every_thins_the_training_but_neither_findings_nor_validations():
    memory = Memory()
    sink = Every(memory, every=10)
    sink.open(run(0))
    for step in range(100):
        sink.write(step, series([step], loss=[1.0]), [FINDING] if step == 55 else [])
    sink.write(99, [Record("sdr", 9.0, 99, phase="val", source="log")], [])
    sink.close()
    assert [record.step for record in memory.records if record.name == "loss"] == list(range(0, 100, 10))
    assert [record.name for record in memory.records if record.phase == "val"] == ["sdr"]
    assert memory.findings == [FINDING]


def test_wrappers_are_sinks_and_can_be_nested():
    memory = Memory()
    sink = OnRank(Every(memory, every=2))
    assert isinstance(sink, Sink)
    sink.open(run(0))
    for step in range(4):
        sink.write(step, series([step], loss=[1.0]), [])
    assert [record.step for record in memory.records] == [0, 2]


def test_every_below_one_is_refused():
    with pytest.raises(ValueError, match="every=0"):
        Every(Memory(), every=0)
