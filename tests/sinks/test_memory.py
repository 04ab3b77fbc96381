from stethoscope import Finding
from stethoscope.sinks import Memory
from stethoscope.testing import series


def test_memory_keeps_everything_in_order_and_stays_readable_after_close():
    memory = Memory()
    records = series(loss=[2.0, 1.0])
    finding = Finding("a", "info", "", "")
    memory.write(0, records[:1], [finding])
    memory.write(1, records[1:], [])
    memory.close()
    memory.close()
    assert memory.records == records
    assert memory.findings == [finding]


def test_two_memories_share_nothing():
    one, two = Memory(), Memory()
    one.write(0, series(loss=[1.0]), [])
    assert two.records == []
