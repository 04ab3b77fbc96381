import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.audits import Schedule, before


def test_nothing_given_is_nothing_said():
    report = before()
    assert report.ok
    assert report.reports == ()


def test_every_audit_that_can_run_does_and_its_findings_reach_a_monitor():
    model = nn.Linear(4, 2)
    batch = {"mixture": torch.zeros(2, 8000), "names": ["a", "b"]}
    report = before(
        model,
        checkpoint={"weight": torch.randn(3, 4)},
        batch=batch,
        sample_rate=8000,
        schedules=[Schedule("sparsify", 10, 20), Schedule("warm-up", 0, 4)],
        planned_steps=5,
    )
    assert len(report.reports) == 4
    codes = [finding.code for finding in report.findings]
    assert codes == ["checkpoint-partial", "audio-silent", "schedule-unreachable"]
    with Monitor(model) as monitor:
        monitor.add(report)
    assert [finding.code for finding in monitor.findings] == codes


def test_a_run_without_end_reaches_every_schedule():
    assert before(schedules=[Schedule("sparsify", 10, 20)], planned_steps=-1).ok


def test_a_batch_without_audio_is_left_alone():
    assert before(batch={"tokens": torch.arange(6)}, sample_rate=8000).reports == ()


def test_what_could_not_be_examined_is_named():
    report = before(batch=torch.randn(2, 16000), schedules=[Schedule("warm-up", 0, 9)])
    assert report.reports == ()
    assert "without sample_rate" in report.summary
    assert "without planned_steps" in report.summary
    assert "no floating-point tensor" in before(batch=torch.arange(4), sample_rate=16000).summary
