import json
import math
from dataclasses import dataclass
from typing import Annotated, TypedDict

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import NotRequired

from stethoscope import Record
from stethoscope._record import FindingsError
from stethoscope.testing import assert_metrics, replay
from stethoscope.watches import Field, MetricSchema


def log(phase="train", start=0, **values):
    """Records of dictionaries, one per position in the lists; `...` leaves a key out."""
    many = max(map(len, values.values()))
    return [
        Record(
            name, None if isinstance(row[i], str) else row[i], start + i, phase=phase, source="log",
            kind="none" if row[i] is None else "str" if isinstance(row[i], str) else "float",
        )
        for i in range(many)
        for name, row in values.items()
        if row[i] is not ...
    ]  # fmt: skip


def codes(found):
    return [(finding.code, finding.evidence.get("metric")) for finding in found]


class Declared(TypedDict):
    loss: float
    th_accuracy: NotRequired[Annotated[float, pydantic.Field(ge=0, le=1)]]
    wer: float | None


@dataclass
class AsDataclass:
    loss: float
    wer: float | None
    th_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0


class AsModel(pydantic.BaseModel):
    loss: float
    wer: float | None
    th_accuracy: float = pydantic.Field(default=0.0, ge=0, le=1)


AS_MAPPING = {"loss": float, "wer": float | None, "th_accuracy": Field(float, required=False, ge=0, le=1)}
DECLARATIONS = [Declared, AsDataclass, AsModel, AS_MAPPING]


@pytest.mark.parametrize("declared", DECLARATIONS, ids=["TypedDict", "dataclass", "pydantic", "mapping"])
def test_every_way_to_declare_says_the_same(declared):
    schema = MetricSchema(declared)
    assert schema.judge({"loss": 1.0, "wer": None}).ok
    assert schema.judge({"loss": 1, "wer": np.float32(0.5), "acc": torch.tensor([1.0])}).ok
    found = schema.judge({"loss": None, "th_accuracy": 26.8}).findings
    assert {(finding.code, finding.evidence["metric"]) for finding in found} == {
        ("metric-type", "loss"),
        ("metric-range", "th_accuracy"),
        ("metric-missing", "wer"),
    }


def test_a_missing_key_is_said_with_the_nearest_name_once_until_it_is_back():
    schema = MetricSchema({"loss": float, "th_accuracy": float})
    found = replay(
        schema, log(loss=[1.0] * 6, th_acuracy=[0.5] * 3 + [...] * 3, th_accuracy=[...] * 3 + [0.5, ..., ...])
    )
    assert codes(found) == [
        ("metric-missing", "th_accuracy"),
        ("metric-unexpected", "th_acuracy"),
        ("metric-missing", "th_accuracy"),
    ]
    assert [finding.step for finding in found] == [0, 0, 4]
    assert found[0].evidence["nearest"] == "th_acuracy"
    assert found[1].evidence["nearest"] == "th_accuracy"
    assert found[1].severity == "warning"


def test_a_key_that_nothing_is_like_is_an_info():
    (found,) = replay(MetricSchema({"loss": float}), log(loss=[1.0] * 3, brightness=[1.0] * 3))
    assert (found.code, found.severity) == ("metric-unexpected", "info")


def test_a_key_that_is_declared_for_another_phase_is_unexpected():
    schema = MetricSchema({"loss": float, "wer": Field(float, phases=("valid",))})
    assert replay(schema, log("dev", loss=[1.0], wer=[0.1])) == []
    (found,) = replay(schema, log(loss=[1.0], wer=[0.1]))
    assert (found.code, found.severity) == ("metric-unexpected", "warning")
    assert "for val only" in found.message


def test_a_range_is_judged_on_entering_and_leaving():
    schema = MetricSchema({"acc": Field(float, ge=0.0, le=1.0, unit="ratio")})
    found = replay(schema, log(acc=[0.5, 26.8, 26.9, 0.5, -0.1]))
    assert [(finding.code, finding.step) for finding in found] == [("metric-range", 1), ("metric-range", 4)]
    assert "26.8 ratio" in found[0].message


def test_types_are_pydantics():
    schema = MetricSchema({"n": int, "flag": bool, "loss": torch.Tensor})
    found = replay(schema, log(n=[2.0, 2.5], flag=[1.0, 0.5], loss=[..., ...]))
    assert ("metric-type", "n") in codes(found)
    assert ("metric-type", "flag") in codes(found)


def test_non_finite_values_are_said_once_per_spell_and_not_for_gradient_norms():
    nan, inf = math.nan, math.inf
    found = replay(MetricSchema(), log(loss=[1.0, nan, nan, 1.0, inf], grad_norm=[nan, inf, 1.0, 1.0, 1.0]))
    assert [(finding.code, finding.step, finding.evidence["value"]) for finding in found] == [
        ("metric-nonfinite", 1, "NaN"),
        ("metric-nonfinite", 4, "Infinity"),
    ]
    assert replay(MetricSchema({"loss": Field(finite=False)}), log(loss=[nan, 1.0])) == []


def test_a_key_that_was_there_and_is_gone_has_vanished():
    (found,) = replay(MetricSchema(), log(loss=[1.0] * 6, acc=[0.5, 0.6, ..., ..., ..., ...]))
    assert (found.code, found.step) == ("metric-vanished", 4)
    # an evaluation that is one dictionary says so at once, also where nothing of training is logged
    (found,) = replay(MetricSchema(), log("val", loss=[1.0] * 6, acc=[0.5, 0.6, ..., ..., ..., ...]))
    assert (found.code, found.step) == ("metric-vanished", 2)
    (found,) = replay(MetricSchema(), log("val", loss=[1.0] * 8, acc=[0.5, 0.6, 0.7] + [None] * 5))
    assert (found.code, found.evidence["none"]) == ("metric-vanished", True)


def test_a_renamed_key_is_missing_with_its_new_name():
    found = replay(
        MetricSchema(), log(loss=[1.0] * 4, accuracy_top1=[0.5, 0.5, ..., ...], top1_accuracy=[..., ..., 0.5, 0.5])
    )
    assert codes(found)[:2] == [("metric-missing", "accuracy_top1"), ("metric-unexpected", "top1_accuracy")]
    assert found[0].evidence["nearest"] == "top1_accuracy"


def test_a_key_that_is_new_in_the_third_round_is_an_info():
    rounds = [
        records
        for start in (0, 10, 20)
        for records in log(start=start, loss=[1.0] * 5) + log("val", start=start + 5, loss=[1.0])
    ]
    (found,) = replay(MetricSchema(), rounds + log(start=30, loss=[1.0] * 3, extra=[1.0] * 3))[:1]
    assert (found.code, found.severity, found.evidence["metric"]) == ("metric-unexpected", "info", "extra")


def test_names_without_end_do_not_fill_the_memory():
    schema = MetricSchema()
    state = schema.init()
    for step in range(1500):
        state, _ = schema.update(
            state, [Record(f"loss_of_{step}", 1.0, step, source="log"), Record("loss", 1.0, step, source="log")]
        )
    assert len(json.dumps(state)) < 400_000


@pytest.mark.parametrize("every", [2, 10, 50])
def test_a_key_that_comes_now_and_then_has_not_vanished(every):
    rare = [0.5 if step % every == 0 else ... for step in range(300)]
    late = [0.5 if step % every == every - 1 else ... for step in range(300)]
    assert replay(MetricSchema(), log(loss=[1.0] * 300, rare=rare, late=late)) == []


def test_metrics_that_are_logged_one_by_one_have_not_vanished():
    stream = []
    for step in range(0, 40, 2):
        stream += log(start=step, loss=[1.0]) + log(start=step + 1, acc=[0.5])
        stream += log("val", start=step, loss=[1.0]) + log("val", start=step + 1, acc=[0.5])
    assert replay(MetricSchema(), stream) == []


def test_none_for_ever_is_an_info():
    (found,) = replay(MetricSchema(), log(loss=[1.0] * 150, wer=[None] * 150))
    assert (found.code, found.severity, found.step) == ("metric-always-none", "info", 99)
    stream = log("val", loss=[1.0], wer=[0.5]) + log(loss=[1.0] * 150, wer=[None] * 150)
    assert replay(MetricSchema(), stream) == []


def test_five_evaluations_without_a_value_are_an_info_and_five_batches_of_one_are_not():
    (found,) = replay(MetricSchema(), log("val", loss=[1.0] * 8, loss_rnnt=[None] * 8))
    assert (found.code, found.severity, found.step) == ("metric-always-none", "info", 4)
    batches = [r._replace(step=7) for r in log("val", loss=[1.0] * 50, wer=[None] * 50)]
    assert replay(MetricSchema(), batches) == []


def test_an_accuracy_of_exactly_zero_a_hundred_times_is_constant():
    (found,) = replay(MetricSchema(), log(acc=[0.0] * 150, reg=[0.0] * 150))
    assert (found.code, found.step, found.evidence["metric"]) == ("metric-constant", 99, "acc")
    assert replay(MetricSchema(), log(acc=([0.0] * 99 + [0.1]) * 2)) == []
    declared = MetricSchema({"score": Field(float, better="higher")})
    assert codes(replay(declared, log(score=[0.0] * 100))) == [("metric-constant", "score")]


def test_the_first_training_batch_is_compared_with_the_sanity_check():
    stream = log("val", val_loss=[3.0]) + log(train_loss=[3.0], train_acc=[0.1])
    (found,) = replay(MetricSchema(), stream)
    assert (found.code, found.severity, found.evidence["metric"]) == ("metric-phase-mismatch", "warning", "train_acc")


def test_names_are_compared_before_there_are_values():
    known = {"train": ["train_loss", "train_acc", "lr"], "val": ["val_loss", "val_wer"]}
    (found,) = MetricSchema().compare(known, step=0)
    assert (found.code, found.step, found.evidence["metric"]) == ("metric-phase-mismatch", 0, "train_acc")
    assert MetricSchema().compare({"train": known["train"]}) == []
    declared = MetricSchema({"loss": Field(float, le=0.5), "wer": Field(phases=("val",)), "th_accuracy": float})
    assert codes(declared.compare(known)) == [("metric-missing", "th_accuracy")]


def test_bookkeeping_of_training_is_not_missed_in_validation():
    stream = log(
        loss=[1.0], lr=[0.1], grad_norm=[2.0], epoch=[1.0], tokens_per_second=[3.0], gpu_mem=[1.0], num_utts=[8.0]
    )
    assert replay(MetricSchema(), stream + log("val", loss=[1.0])) == []


def test_text_is_an_info_and_a_number_that_becomes_text_a_warning():
    found = replay(MetricSchema(), log(note=["good"] * 2, loss=[1.0, "bad"]))
    assert [(finding.code, finding.severity, finding.evidence["metric"]) for finding in found] == [
        ("metric-type", "info", "note"),
        ("metric-type", "warning", "loss"),
    ]


def test_a_graph_in_validation_or_beside_a_loss_warns():
    def grad(name, phase):
        return [Record(name, 1.0, 0, phase=phase, source="log", kind="tensor-grad")]

    severities = [replay(MetricSchema(), grad(*given))[0].severity for given in (("loss", "val"), ("acc", "train"))]
    assert severities == ["warning", "warning"]
    (found,) = replay(MetricSchema(), grad("loss_ctc", "train") * 1)
    assert (found.code, found.severity) == ("metric-grad", "info")
    # the sum of all steps so far keeps the graphs of all of them
    assert replay(MetricSchema(), grad("running_loss", "train"))[0].severity == "warning"


def test_a_result_as_text_warns():
    found = replay(MetricSchema(), log("val", mae=["0.123"] * 2, note=["good"] * 2))
    assert {(finding.evidence["metric"], finding.severity) for finding in found} == {
        ("mae", "warning"),
        ("note", "info"),
    }


@pytest.mark.parametrize(("name", "value", "codes"), [("precision@5", 312.0, ["metric-range"]), ("mrr", 0.4, []), ("precision_loss", 312.0, []), ("ndcg", 62.0, [])])  # fmt: skip
def test_relatives_of_an_accuracy_are_shares(name, value, codes):
    assert [finding.code for finding in replay(MetricSchema(), log("val", **{name: [value] * 2}))] == codes


def test_what_is_carried_through_training_is_not_missed_in_validation():
    assert replay(MetricSchema(), log(loss=[1.0], running_loss=[1.0]) + log("val", loss=[1.0])) == []


def test_records_of_other_sources_are_passed_over():
    schema = MetricSchema({"loss": float})
    state = schema.init()
    assert schema.update(state, [Record("loss", math.nan, 0, source="step"), Record("x", 1.0, 0)]) == (state, [])


def test_a_declared_mean_that_is_not_the_mean_of_its_batches():
    schema = MetricSchema({"loss": float, "cv_loss": Field(mean_of="loss", weight="num_utts"), "num_utts": int})
    batches = log("cv", loss=[20.0, 30.0, 30.43], num_utts=[2.0, 2.0, 2.0])
    assert replay(schema, batches + log("cv", start=3, cv_loss=[160.86 / 6])) == []
    (found,) = replay(schema, batches + log("cv", start=3, cv_loss=[22.98]))
    assert found.code == "metric-aggregate"
    assert "denominator starts at 1" in found.message


def test_validate_returns_every_declared_key_and_never_makes_up_a_number():
    schema = MetricSchema({"loss": float, "th_accuracy": float, "wer": Field(required=False)}, on_mismatch="fill")
    assert schema.validate({}, "val") == {"loss": None, "th_accuracy": None, "wer": None}
    given = {"val_loss": torch.tensor([2.0], requires_grad=True), "acc": None, "extra": np.int64(3), "text": "a"}
    assert schema.validate(given, "cv") == {"loss": 2.0, "th_accuracy": None, "wer": None, "extra": 3.0, "text": None}
    assert schema.validate((torch.tensor(1.0), {"th_accuracy": 0.0}, 4)) == {
        "loss": 1.0,
        "th_accuracy": 0.0,
        "wer": None,
        "weight": 4.0,
    }


def test_validate_raises_or_warns_when_asked_to():
    fields = {"loss": float, "th_accuracy": float}
    with pytest.raises(FindingsError, match="'th_accuracy' is declared as required and is missing") as error:
        MetricSchema(fields, on_mismatch="raise").validate({"loss": 1.0}, "val")
    assert error.value.findings[0].code == "metric-missing"
    with pytest.warns(UserWarning, match="th_accuracy"):
        assert MetricSchema(fields).validate({"loss": 1.0})["th_accuracy"] is None
    MetricSchema(fields, on_mismatch="raise").validate({"loss": 1.0, "th_accuracy": 0.0, "something": 1.0})


@pytest.mark.parametrize("given", [3.0, None, [("loss", 1.0)], {1: 1.0}])
def test_validate_refuses_what_is_no_dictionary(given):
    with pytest.raises(TypeError, match="etrics must be"):
        MetricSchema().validate(given)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"fields": {"loss": str}}, "'loss'.*no type for a metric"),
        ({"fields": {"loss": Field, "acc": float}}, "no type for a metric"),
        ({"fields": {"loss": float, "error": Field(aliases=("loss",))}}, "both claim the name 'loss'"),
        ({"fields": {"val_loss": float, "val/loss": float}}, "both claim the name 'loss' in phase 'val'"),
        ({"fields": {"val_loss": Field(phases=("train",))}}, "its name says 'val'"),
        ({"fields": {"loss": float}, "aliases": {"a": "b"}}, "belong to no declared metric"),
        ({"fields": {"a": float, "b": float}, "aliases": {"a": "b"}}, "both claim"),
        ({"fields": {"a": Field(mean_of="a")}}, "mean of itself"),
        ({"on_mismatch": "ignore"}, "Legal: 'raise', 'warn', 'fill'"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        MetricSchema(**arguments)


@pytest.mark.parametrize("limits", [{"ge": 2, "le": 1}, {"gt": 1, "lt": 1}, {"better": "more"}])
def test_a_field_that_contradicts_itself_is_refused(limits):
    with pytest.raises(ValueError, match=r"No number is within|is unknown"):
        Field(float, **limits)


@pytest.mark.parametrize("fields", [3, ["loss"], "loss", Declared(loss=1.0, wer=None).keys()])
def test_what_declares_nothing_is_refused(fields):
    with pytest.raises(TypeError, match="Cannot read metrics from"):
        MetricSchema(fields)


def test_aliases_work_in_both_directions():
    for aliases in ({"hits": "th_accuracy"}, {"th_accuracy": "hits"}, {"th_accuracy": ["hits", "good"]}):
        schema = MetricSchema({"th_accuracy": float}, aliases=aliases)
        assert replay(schema, log("val", val_hits=[0.5])) == []
    stream = log(loss=[1.0], hits=[0.5]) + log("val", loss=[1.0], good=[0.5])
    assert codes(replay(MetricSchema(), stream))[0] == ("metric-phase-mismatch", "hits")
    assert replay(MetricSchema(aliases={"good": "hits"}), stream) == []


def test_a_name_for_one_phase_stands_before_the_same_name_for_all():
    schema = MetricSchema({"loss": float, "val_loss": Field(float, le=1.0)})
    stream = log(loss=[3.0]) + log("val", val_loss=[2.0])
    assert codes(replay(schema, stream)) == [("metric-range", "val_loss")]


def test_markdown_is_a_table_and_untrusted_text_is_escaped():
    schema = MetricSchema({"loss": Field(float, ge=0, unit="nat", description="a|b <script>"), "acc|x": float | None})
    lines = schema.to_markdown().splitlines()
    assert lines[0].startswith("| Metric | Type | Unit | Range |")
    assert lines[2] == "| `loss` | number | nat | [0, inf) | yes | no | all |  |  | a\\|b &lt;script> |"
    assert "`acc\\|x`" in lines[3]


def test_assert_metrics_passes_or_lists_what_is_wrong():
    schema = MetricSchema({"loss": float, "acc": Field(float, le=1.0)})
    assert_metrics(lambda batch: {"loss": batch.sum(), "acc": 1.0}, torch.ones(3), schema)
    with pytest.raises(AssertionError, match=r"(?s)metric-range.*metric-missing|metric-missing.*metric-range"):
        assert_metrics(lambda batch: {"acc": 26.0}, torch.ones(3), schema, phase="val")


VALUES = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.0]))
NAMES = st.sampled_from(["loss", "train_loss", "val_acc", "acc", "lr", "x|y", "valid/wer_epoch", ""])
STREAM = st.lists(st.tuples(st.sampled_from(["train", "val", "cv", "odd"]), st.dictionaries(NAMES, VALUES, max_size=5)))
SCHEMAS = [MetricSchema(), MetricSchema({"loss": Field(float, ge=0), "acc": float | None, "val_acc": float})]


@settings(max_examples=100, deadline=None)
@given(STREAM, st.integers(0, 20), st.sampled_from(SCHEMAS))
def test_any_stream_is_judged_alike_in_one_go_and_resumed(stream, cut, schema):
    dictionaries = [
        tuple(
            Record(name, value, step, phase=phase, source="log", kind="none" if value is None else "tensor")
            for name, value in metrics.items()
        )
        for step, (phase, metrics) in enumerate(stream)
    ]
    whole, found = schema.init(), []
    parts, found_in_parts = schema.init(), []
    for step, records in enumerate(dictionaries):
        whole, said = schema.update(whole, records)
        found += said
        if step == cut:
            parts = json.loads(json.dumps(parts))
        frozen = json.dumps(parts)
        after, said = schema.update(parts, records)
        assert json.dumps(parts) == frozen
        parts = after
        found_in_parts += said
        assert all(finding.step == step for finding in said)
    assert found == found_in_parts
    assert json.loads(json.dumps(whole)) == whole
    assert json.dumps([dict(finding.evidence) for finding in found])


@pytest.mark.parametrize("value", [1.0, [float], torch.float32])
def test_a_value_in_place_of_a_type_is_refused_in_words(value):
    with pytest.raises(ValueError, match=r"Metric 'loss': .* is no type for a metric"):
        MetricSchema({"loss": value})


def run(results, losses, *, planned=None, trained=None, name="exact"):
    """An evaluation at every 50th step."""
    records = [] if planned is None else [Record("plan/steps", planned, 0, source="step")]
    for i, (result, loss) in enumerate(zip(results, losses, strict=True)):
        at = 50 * i + 49
        if trained is not None:
            records += [Record("loss", trained[i], step, source="step") for step in range(at - 4, at + 1)]
        records += [
            Record(key, value, at, phase="val", source="log") for key, value in (("loss", loss), (name, result))
        ]
    return records


IMPROVES = [3.0, 2.0, 1.5, 1.2, 1.0, 0.9]


@pytest.mark.parametrize("value", [0.0, 0.125, 61.3])
@pytest.mark.parametrize("name", ["exact", "val_wer", "accuracy", "si_sdr"])
def test_a_result_that_stays_while_the_loss_improves_is_constant_after_half_of_the_run(value, name):
    found = replay(MetricSchema(), run([value] * 6, IMPROVES, planned=300, name=name))
    perfect = value == 0.0 and name == "val_wer"
    assert [(f.code, f.severity, f.step) for f in found] == ([] if perfect else [("metric-constant", "warning", 199)])
    by_training = run([value] * 6, [1.0] * 6, planned=300, trained=IMPROVES, name=name)
    assert codes(replay(MetricSchema(), by_training)) == ([] if perfect else [("metric-constant", name)])


@pytest.mark.parametrize(
    ("results", "losses", "name"),
    [
        pytest.param([0.0] * 6, [3.0, 2.9, 3.0, 2.8, 2.9, 2.9], "exact", id="nothing is learnt"),
        pytest.param([0.0, 0.0, 0.0, 0.01, 0.05, 0.1], IMPROVES, "exact", id="right after a third"),
        pytest.param([1.0] * 6, IMPROVES, "accuracy", id="all right"),
        pytest.param([0.5] * 6, IMPROVES, "margin", id="a setting"),
        pytest.param([0.25, 0.25, 0.5, 0.5, 0.5, 0.625], IMPROVES, "accuracy", id="few items"),
    ],
)
def test_usual_results_are_not_constant(results, losses, name):
    assert replay(MetricSchema(), run(results, losses, planned=300, name=name)) == []


def test_without_a_plan_twenty_evaluations_are_needed():
    losses = [3 * 0.8**i for i in range(22)]
    assert replay(MetricSchema(), run([0.0] * 19, losses[:19])) == []
    assert [f.step for f in replay(MetricSchema(), run([0.0] * 22, losses))] == [999]
