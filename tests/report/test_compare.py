import json
import random
from dataclasses import replace

import numpy as np
import pytest

from stethoscope import Finding, Record, report, sinks
from stethoscope._protocols import Run

MODULES = (("", "Net"), ("a", "Linear"), ("b", "Linear"))


def written(place, seed, change=None, steps=60):
    """Layers with 3 % of noise; from step 40 on, `change` multiplies layer b."""
    generator = random.Random(seed)
    sink = sinks.Jsonl(place)
    sink.open(Run(str(place), "", MODULES))
    for step in range(steps):
        values = {name: depth * (1 + generator.gauss(0, 0.03)) for depth, name in enumerate("ab", 1)}
        loss = generator.gauss(0, 0.1) - step / 10  # may be negative
        if change is not None and step >= 40:
            values["b"] *= change
        records = [Record("activation/rms", value, step, module=name) for name, value in values.items()]
        sink.write(step, [Record("loss", loss, step, source="step"), *records], [])
    sink.close()
    return report.summarise(place)


def test_runs_with_other_seeds_do_not_part(tmp_path):
    for seed in range(1, 12):
        found = report.compare(written(tmp_path / "0", 0), written(tmp_path / str(seed), seed))
        assert found.partings == ()
        assert found.equal_until is None


@pytest.mark.parametrize(
    ("seed", "change"), [(0, 1.5), (0, 0.5), (0, float("nan")), (0, 0.0), (1, 8.0), (1, float("inf"))]
)
def test_the_layer_and_the_step_where_they_part(tmp_path, seed, change):
    found = report.compare(written(tmp_path / "one", 0), written(tmp_path / "other", seed, change))
    part = found.partings[0]
    assert (part.name, part.module, part.step) == ("activation/rms", "b", 40)
    assert len(found.partings) == 1
    assert found.equal_until == (39 if seed == 0 else None)
    assert "part at step 40: Activation rms of b" in report.compared_html(found)


def test_one_odd_batch_is_no_parting(tmp_path):
    one = written(tmp_path / "one", 0)
    other = written(tmp_path / "other", 0)
    grid = other.grids["activation/rms", "train"]
    for step in (30, 31):
        grid.add(step, ("b",), np.array([50.0]))
    assert report.compare(one, other).partings == ()


def test_a_run_with_itself_is_equal_to_its_end(tmp_path):
    one = written(tmp_path / "one", 0)
    found = report.compare(one, one)
    assert (found.equal_until, found.common, found.partings) == (59, 60, ())


def test_runs_without_a_common_step(tmp_path, writing):
    found = report.compare(written(tmp_path / "one", 0, steps=0), writing_summary(writing, tmp_path))
    assert found.common == 0
    assert "no observed step in common" in report.compared_markdown(found)


def writing_summary(writing, tmp_path):
    return report.summarise(writing(tmp_path / "other"))


def test_findings_that_only_one_has(faulty, healthy):
    found = report.compare(report.summarise(healthy), report.summarise(faulty))
    assert [cause.code for cause in found.only_second] == ["nonfinite-activation", "input-range"]
    assert found.only_first == ()
    told = json.loads(report.compared_json(found))
    assert told["only_second"] == ["nonfinite-activation", "input-range"]
    assert "Only in B: faulty" in report.compared_html(found)


def test_a_finding_without_a_parting_is_the_headline(tmp_path, writing):
    broken = Finding("output-collapse", "error", "Alike.", "Look.", 12)
    one, other = writing(tmp_path / "one"), writing(tmp_path / "other", findings=(broken,))
    found = report.compare(report.summarise(one), report.summarise(other))
    assert found.partings == ()
    assert "Only B has output-collapse (step 12); the numbers do not part" in report.compared_html(found)
    found = report.compare(report.summarise(other), report.summarise(one))
    assert "The runs do not part beyond noise" in report.compared_markdown(found)


def test_what_differs_first_tells_a_learning_rate_from_a_seed(tmp_path):
    for name, rate in (("one", 0.001), ("other", 3.0)):
        sink = sinks.Jsonl(tmp_path / name)
        sink.open(Run(name, "", MODULES))
        for step in range(10):
            told = {"loss": 1.0 if step == 0 else 1.0 / (1 + step * rate), "lr": rate}
            sink.write(step, [Record(key, value, step, source="step") for key, value in told.items()], [])
        sink.close()
    found = report.compare(report.summarise(tmp_path / "one"), report.summarise(tmp_path / "other"))
    assert (found.equal_until, found.differ_first) == (None, ("lr",))
    page = report.compared_html(found)
    assert "from the first common step on (Learning rate)" in page
    assert "3 at first, 3 at last" in page


def test_the_model_as_a_whole_is_no_other_layer(tmp_path):
    found = report.compare(
        written(tmp_path / "one", 0, steps=60), written(tmp_path / "other", 0, float("nan"), steps=60)
    )
    whole = replace(found.partings[0], name="loss", module="")
    assert "and 1 layer then or later" in report.compared_markdown(replace(found, partings=(whole, *found.partings)))
