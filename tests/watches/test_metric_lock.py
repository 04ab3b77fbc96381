import json

import pytest

from stethoscope import Record
from stethoscope.testing import replay
from stethoscope.watches import Field, MetricSchema

FIELDS = {
    "loss": Field(float, unit="nat", better="lower"),
    "th_accuracy": Field(float, ge=0.0, le=1.0, nullable=True, aliases=("acc2",), phases=("train", "val")),
    "n": Field(int, gt=0, required=False),
    "flag": bool,
}


def test_what_is_written_is_read_back(tmp_path):
    path = MetricSchema(FIELDS).write_lock(tmp_path / "schema.lock.json")
    locked = MetricSchema(lock=path)
    assert locked.declared == MetricSchema(FIELDS).declared
    assert locked.to_markdown() == MetricSchema({name: locked.declared[name] for name in sorted(FIELDS)}).to_markdown()
    assert MetricSchema(FIELDS, lock=path).difference() == ""


def test_each_metric_has_its_line_so_that_git_shows_what_changed(tmp_path):
    path = MetricSchema(FIELDS).write_lock(tmp_path / "a.json")
    lines = path.read_text().splitlines()
    assert sum('"type"' in line for line in lines) == len(FIELDS)
    assert [line.split('"')[1] for line in lines if '"type"' in line] == sorted(FIELDS)
    json.loads(path.read_text())


def test_a_change_is_readable_and_found_at_the_first_dictionary(tmp_path):
    path = MetricSchema(FIELDS).write_lock(tmp_path / "schema.lock.json")
    changed = {**FIELDS, "th_accuracy": Field(float, ge=0.0, le=100.0), "wer": Field(float, ge=0.0)}
    del changed["n"]
    schema = MetricSchema(changed, lock=path)
    assert schema.difference().splitlines() == [
        "- n: integer, (0, inf), optional",
        "~ th_accuracy: aliases acc2 -> none, maximum 1.0 -> 100.0, nullable yes -> no, phases train, val -> none",
        "+ wer: number, [0, inf), required",
    ]
    records = [Record(name, 1.0, step, source="log") for step in range(3) for name in changed]
    (found,) = replay(schema, records)
    assert (found.code, found.step) == ("metric-lock", 0)


def test_a_missing_lock_file_is_not_yet_written():
    assert MetricSchema(lock="nowhere/schema.lock.json").declared == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "no lock file"),
        ("{}", "no lock file"),
        ('{"version": "x", "metrics": {}}', "no lock file"),
        ('{"version": 1, "metrics": {"a": {"type": "text"}}}', "no lock file"),
        ('{"version": 1, "metrics": {"a": {"type": "number", "colour": 1}}}', "unknown properties"),
        ('{"version": 99, "metrics": {}}', "Upgrade stethoscope"),
    ],
)
@pytest.mark.parametrize("fields", [None, {"loss": float}])
def test_a_corrupt_or_newer_lock_file_is_refused_at_once(tmp_path, text, says, fields):
    path = tmp_path / "schema.lock.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        MetricSchema(fields, lock=path)
    assert "schema.lock.json" in str(error.value)


def test_a_binary_lock_file_is_refused(tmp_path):
    path = tmp_path / "schema.lock.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no lock file"):
        MetricSchema(lock=path)


def test_nothing_to_lock_and_nowhere_to_put_it_are_errors(tmp_path):
    with pytest.raises(ValueError, match="Nothing is declared"):
        MetricSchema().write_lock(tmp_path / "a.json")
    with pytest.raises(ValueError, match="No path"):
        MetricSchema(FIELDS).write_lock()


def test_what_was_learned_can_be_locked(tmp_path):
    schema = MetricSchema.learn(
        [{"loss": 1.0, "acc": 0.5, "lr": 0.1, "cer": None}] * 2, [{"loss": 1.0, "cer": 0.3, "note": "x"}]
    )
    assert set(schema.declared) == {"loss", "acc", "cer"}
    assert schema.declared["acc"].phases == ("train",)
    assert schema.declared["cer"].nullable
    locked = MetricSchema(lock=schema.write_lock(tmp_path / "schema.lock.json"))
    records = [Record("loss", 1.0, 0, source="log"), Record("cer", None, 0, source="log", kind="none")]
    (found,) = replay(locked, records)
    assert (found.code, found.evidence["metric"]) == ("metric-missing", "acc")


@pytest.mark.parametrize(
    "entry", ['{"type": "number", "minimum": 2, "maximum": 1}', '{"type": "number", "required": "yes"}']
)
def test_an_entry_that_contradicts_itself_is_refused_with_its_file_and_name(entry, tmp_path):
    path = tmp_path / "schema.lock.json"
    path.write_text(f'{{"version": 1, "metrics": {{"th_accuracy": {entry}}}}}')
    with pytest.raises(ValueError, match=r"schema\.lock\.json is no lock file.*'th_accuracy'.*Restore it"):
        MetricSchema(lock=path)
