from stethoscope import Record
from stethoscope._protocols import Run
from stethoscope.sinks import Jsonl, read
from stethoscope.watches import names_by_rank, rank_differences


def test_a_recorded_run_of_two_ranks_is_compared(tmp_path):
    for rank, extra in enumerate(({}, {"aux": 2.0})):
        sink = Jsonl(tmp_path / "run")
        sink.open(Run("run", "2026-01-01T00:00:00+00:00", rank=rank, world_size=2))
        records = [Record(name, value, 0, rank=rank, source="log") for name, value in ({"loss": 1.0} | extra).items()]
        sink.write(0, records, [])
        sink.close()
    written = [record for rank in (0, 1) for _, records, _ in read(tmp_path / "run", rank=rank) for record in records]
    (found,) = rank_differences(names_by_rank(written))
    assert found.evidence == {"metric": "aux", "logged_on": [1], "missing_on": [0]}


def test_ranks_that_log_alike_are_left_alone():
    records = [Record("loss", 1.0, 0, rank=rank, source="log") for rank in range(4)]
    assert rank_differences(names_by_rank(records)) == []
    assert rank_differences({}) == []


def test_a_name_that_some_ranks_lack_is_found_from_records():
    records = [Record("loss", 1.0, 0, rank=rank, source="log") for rank in range(4)]
    records += [Record("aux", 1.0, 0, rank=rank, source="log") for rank in (1, 3)]
    records += [Record("gradient/norm", 1.0, 0, rank=2)]
    (found,) = rank_differences(names_by_rank(records))
    assert (found.code, found.severity) == ("metric-ranks", "error")
    assert found.evidence == {"metric": "aux", "logged_on": [1, 3], "missing_on": [0, 2]}
    assert "ranks 1, 3, but not on ranks 0, 2" in found.message
