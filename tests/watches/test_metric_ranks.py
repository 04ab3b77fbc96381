from stethoscope import Record
from stethoscope.watches import names_by_rank, rank_differences


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
