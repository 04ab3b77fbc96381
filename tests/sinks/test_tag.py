import pytest

from stethoscope import Record
from stethoscope.sinks._tag import FOREIGN, tag


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (Record("activation/rms", 1.0, 0, module="encoder.3"), "activation/rms/encoder.3"),
        (Record("activation/rms", 1.0, 0, module="encoder.3", call=2), "activation/rms/encoder.3#2"),
        (Record("activation/rms", 1.0, 0, module="encoder.3", phase="val"), "activation_val/rms/encoder.3"),
        (Record("gradient/norm", 1.0, 0), "gradient/norm"),
        (Record("loss", 1.0, 0, source="step"), "step/loss"),
        (Record("lr/1", 1.0, 0, source="step"), "step/lr/1"),
        (Record("th_accuracy", 1.0, 0, phase="val", source="log"), "val/th_accuracy"),
        (Record("alone", 1.0, 0, phase="val"), "alone_val"),
    ],
)
def test_tag_is_group_statistic_module_call_and_the_phase_marks_the_group(record, name):
    assert tag(record) == name


def test_a_foreign_prefix_stays_within_the_first_segment():
    assert tag(Record("activation/rms", 1.0, 0, module="enc"), FOREIGN) == "stethoscope_activation/rms/enc"
