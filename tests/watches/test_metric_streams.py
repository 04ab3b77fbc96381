"""Streams of metric dictionaries as seven toolkits hand them over, and the five histories of wenet-e2e/wenet#2336."""

import json
import random

import numpy as np
import pytest
import torch

from stethoscope import Monitor, Record
from stethoscope._metrics import normalise
from stethoscope.watches import Field, MetricSchema


def follow(stream, schema=None):
    """Run a schema over (phase, dictionary) pairs as the monitor would; the state goes through JSON on its way."""
    schema = schema or MetricSchema()
    state, found = schema.init(), []
    for step, (phase, metrics) in enumerate(stream):
        records = tuple(
            Record(name, None if value is None else float(value), step, phase=phase, source="log", kind=kind)
            for name, value, kind in normalise(metrics)
        )
        before = json.dumps(state)
        new, findings = schema.update(state, records)
        assert json.dumps(state) == before, "the fold changed its argument"
        state = json.loads(json.dumps(new))
        found += findings
    return found


def loss(rng, step):
    return 30.0 / (1 + step / 40) + rng.gauss(0, 0.3)


def wenet(rng, epochs=3, steps=30):
    step = 0
    for _ in range(epochs):
        for _ in range(steps):
            step += 1
            value = loss(rng, step)
            tensors = {
                "loss": torch.tensor(value, requires_grad=False),
                "loss_att": torch.tensor(value * 1.1),
                "loss_ctc": torch.tensor(value * 0.9),
                "loss_rnnt": None,
                "th_accuracy": torch.tensor(min(0.9, step / 100)),
            }
            yield "train", tensors
            yield "train", {name: None if item is None else item.item() for name, item in tensors.items()} | {"lr": 0.1}
        for _ in range(5):
            value = loss(rng, step)
            yield "cv", {"loss": value, "loss_att": value, "loss_ctc": torch.tensor(value), "acc": 0.5}


def espnet(rng, epochs=3, steps=30):
    for epoch in range(epochs):
        for step in range(steps):
            value = torch.tensor(loss(rng, epoch * steps + step), requires_grad=True)
            stats = {"loss_ctc": value.detach().view(1), "acc": torch.rand(1), "cer": None, "wer": None}
            yield "train", (value, stats, torch.tensor([8.0]))
        for _ in range(4):
            value = torch.tensor(loss(rng, (epoch + 1) * steps))
            stats = {"loss_ctc": value.view(1), "acc": torch.rand(1), "cer": torch.rand(1), "wer": torch.rand(1)}
            yield "valid", (value, stats, torch.tensor([5.0]))


def funasr(rng, epochs=3, steps=30):
    for epoch in range(epochs):
        for phase, many in (("train", steps), ("val", 4)):
            for step in range(many):
                value = torch.tensor(loss(rng, epoch * steps + step), requires_grad=phase == "train")
                stats = {
                    "loss": value.detach().clone(),
                    "acc": torch.tensor(rng.random()),
                    "batch_size": rng.randint(1, 9),
                }
                yield phase, (value, stats, torch.tensor(8))


def speechbrain(rng, epochs=6, steps=30):
    for epoch in range(epochs):
        train = {"loss": loss(rng, epoch * steps), "per_batch": [loss(rng, epoch * steps + i) for i in range(steps)]}
        valid = {"loss": loss(rng, epoch * steps), "per_batch": [1.0, 2.0], "PER": 20.0 / (epoch + 1)}
        yield "train", {"epoch": epoch, "lr": 1e-3, "train": train, "valid": valid}


def nemo(rng, epochs=3, steps=30):
    for epoch in range(epochs):
        for step in range(steps):
            metrics = {"train_loss": torch.tensor(loss(rng, epoch * steps + step)), "learning_rate": 1e-3}
            if step % 10 == 9:
                metrics["training_batch_wer"] = torch.tensor(rng.random())
            yield "train", metrics | {"global_step": epoch * steps + step, "train_step_timing in s": 0.3}
        for _ in range(4):
            yield (
                "val",
                {"val_loss": torch.tensor(3.0), "val_wer_num": torch.tensor(7), "val_wer_denom": torch.tensor(90)},
            )
        yield "val", {"val_loss": torch.tensor(3.0), "val_wer": torch.tensor(7 / 90)}
    yield "test", {"test_loss": torch.tensor(3.0), "test_wer": torch.tensor(0.1)}


def lightning(rng, epochs=3, steps=30):
    """`callback_metrics` at every step: empty in the sanity check, old keys stay."""
    held = {}
    yield "val", {}
    yield "val", {"val_loss/dataloader_idx_0": torch.tensor(9.0), "val_acc/dataloader_idx_1": torch.tensor(0.1)}
    for epoch in range(epochs):
        for step in range(steps):
            value = torch.tensor(loss(rng, epoch * steps + step))
            held |= {"train_loss": value, "train_loss_step": value}
            yield "train", dict(held)
        held |= {"val_loss/dataloader_idx_0": torch.tensor(3.0), "val_acc/dataloader_idx_1": torch.tensor(0.4)}
        yield "val", dict(held)
        held |= {"train_loss_epoch": torch.tensor(3.0), "train_acc": torch.tensor(0.5)}
        yield "train", dict(held)


def huggingface(rng, epochs=3, steps=30):
    for epoch in range(epochs):
        for step in range(steps):
            logs = {"loss": loss(rng, epoch * steps + step), "grad_norm": float("inf") if step == 3 else 1.0}
            yield "train", logs | {"learning_rate": 1e-4, "epoch": epoch + step / steps}
        logs = {
            "eval_loss": 3.0,
            "eval_accuracy": np.float64(0.5),
            "eval_runtime": 1.2,
            "eval_samples_per_second": 88.0,
        }
        yield "train", logs | {"epoch": epoch + 1.0}
        yield "eval", logs
    yield (
        "train",
        {"train_runtime": 9.0, "train_samples_per_second": 30.0, "total_flos": 1e12, "train_loss": 8.0, "epoch": 3.0},
    )


TOOLKITS = [wenet, espnet, funasr, speechbrain, nemo, lightning, huggingface]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("toolkit", TOOLKITS, ids=lambda toolkit: toolkit.__name__)
def test_a_healthy_stream_gives_no_finding(toolkit, seed):
    torch.manual_seed(seed)
    found = follow(toolkit(random.Random(seed)))
    if toolkit is wenet:  # a model without RNN-T says None for ever: true, and no more than an info
        (none,) = found
        assert (none.code, none.severity, none.evidence["metric"]) == ("metric-always-none", "info", "loss_rnnt")
        found = []
    assert found == []


@pytest.mark.parametrize("toolkit", TOOLKITS, ids=lambda toolkit: toolkit.__name__)
def test_a_healthy_stream_fits_what_was_learned_from_its_first_third(toolkit):
    stream = list(toolkit(random.Random(0)))
    learned = MetricSchema.learn(
        [metrics for phase, metrics in stream[:70] if phase == "train"],
        [metrics for phase, metrics in stream[:70] if phase != "train"],
    )
    assert not [finding for finding in follow(stream, learned) if finding.severity == "error"]


def cadences(rng):
    """Each metric comes at steps of its own, in one dictionary or in several; validation is logged whole or in pieces."""
    names = rng.sample(["loss", "loss_ctc", "loss_att", "acc", "wer", "si_sdr_db", "kl"], rng.randint(2, 5))
    every = {name: rng.choice([1, 1, 1, 2, 5, 10, 50]) for name in names}
    offset = {name: rng.choice([0, every[name] - 1]) for name in names}
    prefix, pieces = rng.choice(["", "val_", "valid/"]), rng.random() < 0.3
    for epoch in range(rng.choice([1, 3, 6])):
        for step in range(epoch * 60, epoch * 60 + 60):
            held = {name: rng.random() for name in names if step % every[name] == offset[name]}
            yield from [("train", {name: held[name]}) for name in held] if pieces else [("train", held)]
        held = {prefix + name: rng.random() for name in names}
        yield from [("val", {name: held[name]}) for name in held] if pieces else [("val", held)]


@pytest.mark.parametrize("seed", range(40))
def test_metrics_at_any_cadence_give_no_warning(seed):
    assert [finding for finding in follow(cadences(random.Random(seed))) if finding.severity != "info"] == []


def rnnt(rng, *, accuracy, steps=20):
    """Training of a pure RNN-T: what its forward returns for `th_accuracy` is the history."""
    for step in range(steps):
        value = torch.tensor(loss(rng, step))
        yield "train", {"loss": value, "loss_rnnt": value} | accuracy


def codes(found):
    return [(finding.code, finding.evidence.get("metric")) for finding in found]


def test_history_1_a_tuple_in_place_of_a_loss():
    value = torch.tensor(3.0, requires_grad=True)
    stream = [("train", {"loss": value.detach(), "loss_ctc": (value, torch.zeros(4, 9, 30))})] * 5
    (found,) = follow(stream)
    assert (found.code, found.severity, found.evidence["metric"]) == ("metric-type", "warning", "loss_ctc")
    assert "tuple" in found.message


def test_history_2_the_accuracy_is_missing():
    schema = MetricSchema({"loss": float, "th_accuracy": Field(float, ge=0, le=1), "loss_rnnt": Field(required=False)})
    found = follow(rnnt(random.Random(0), accuracy={}), schema)
    assert codes(found) == [("metric-missing", "th_accuracy")]
    assert found[0].step == 0
    # Another model of the same code base has it in training; validation of this one does not.
    stream = [("train", {"loss": 3.0, "th_accuracy": 0.1})] * 3 + [("cv", {"loss": 2.0})]
    (found,) = follow(stream)
    assert (found.code, found.severity, found.phase) == ("metric-phase-mismatch", "warning", "cv")
    assert found.evidence["metric"] == "th_accuracy"
    assert found.evidence["val"] == "missing"


def test_history_3_none_in_training_becomes_zero_in_validation():
    stream = [*rnnt(random.Random(0), accuracy={"th_accuracy": None})]
    stream += [("cv", {"loss": 2.0, "loss_rnnt": 2.0, "acc": 0.0})] * 3
    (found,) = follow(stream)
    assert (found.code, found.severity) == ("metric-phase-mismatch", "warning")
    assert (found.evidence["train"], found.evidence["val"]) == ("none", 0.0)


def test_history_3_also_where_none_is_declared_or_the_name_says_its_phase():
    declared = MetricSchema({"loss": float, "loss_rnnt": float, "th_accuracy": float | None})
    stream = [*rnnt(random.Random(0), accuracy={"th_accuracy": None})]
    cv = {"loss": 2.0, "loss_rnnt": 2.0}
    for name, schema in (("acc", declared), ("val_acc", declared), ("valid/accuracy", MetricSchema())):
        (found,) = follow([*stream, ("cv", cv | {name: 0.0})], schema)
        assert (found.code, found.severity, found.evidence["train"]) == ("metric-phase-mismatch", "warning", "none")
        assert follow([*stream, ("cv", cv | {name: 0.5})], schema) == []


def test_history_4_missing_in_training_becomes_zero_in_validation():
    stream = [*rnnt(random.Random(0), accuracy={})]
    stream += [("cv", {"loss": 2.0, "loss_rnnt": 2.0, "acc": 0.0})] * 3
    at_once, after_three = follow(stream)
    assert (at_once.code, at_once.severity) == ("metric-phase-mismatch", "info")
    assert (after_three.code, after_three.severity) == ("metric-phase-mismatch", "warning")
    assert (after_three.evidence["train"], after_three.evidence["val"]) == ("missing", 0.0)


def test_history_5_a_float_among_tensors():
    stream = [("train", {"loss": torch.tensor(3.0), "th_accuracy": torch.tensor(0.5)})] * 3
    stream += [("train", {"loss": torch.tensor(3.0), "th_accuracy": 0.5})] * 3
    (found,) = follow(stream)
    assert (found.code, found.evidence["metric"], found.evidence["kind"]) == ("metric-type", "th_accuracy", "float")
    declared = MetricSchema({"loss": torch.Tensor, "th_accuracy": torch.Tensor})
    (found,) = follow(stream[3:], declared)
    assert (found.code, found.severity, found.evidence["metric"]) == ("metric-type", "error", "th_accuracy")


def test_history_5_where_only_validation_has_the_float():
    train = [("train", {"loss": torch.tensor(3.0), "loss_ctc": torch.tensor(3.0), "acc": torch.tensor(0.5)})] * 3
    (found,) = follow([*train, ("cv", {"loss": 3.0, "loss_ctc": torch.tensor(3.0), "acc": torch.tensor(0.5)})])
    assert (found.code, found.phase, found.evidence["metric"]) == ("metric-type", "cv", "loss")
    assert follow([*train, ("cv", {"loss": 3.0, "loss_ctc": 3.0, "acc": 0.5})]) == []
    assert follow([*train, ("cv", {"loss": torch.tensor(3.0), "loss_ctc": torch.tensor(3.0), "acc": 0.5})]) == []


def test_none_missing_and_zero_are_three_things():
    train = [("train", {"loss": 1.0})] * 3
    with_none = follow([*train, ("val", {"loss": 1.0, "acc": None})])
    missing = follow([*train, ("val", {"loss": 1.0})])
    zero = follow([*train, ("val", {"loss": 1.0, "acc": 0.0})])
    assert (codes(with_none), codes(missing)) == ([], [])
    assert codes(zero) == [("metric-phase-mismatch", "acc")]


@pytest.mark.parametrize("toolkit", TOOLKITS, ids=lambda toolkit: toolkit.__name__)
def test_the_monitor_finds_what_the_records_say(toolkit):
    """Tensors come late and in an order of their own; the verdict is the same."""
    stream = list(toolkit(random.Random(0)))
    broken = [*stream, ("train", {"loss": float("nan")}), ("val", {"surprise": torch.tensor(float("inf"))})]
    with Monitor(torch.nn.Linear(1, 1), watches=[MetricSchema()], strict=True) as monitor:
        for phase, metrics in broken:
            monitor.log(metrics, phase)
    assert sorted(codes(monitor.findings)) == sorted(codes(follow(broken)))
    assert "metric-nonfinite" in {finding.code for finding in monitor.findings}


def test_history_2_through_the_monitor():
    with Monitor(torch.nn.Linear(1, 1), watches=[MetricSchema()], strict=True) as monitor:
        for _ in range(5):
            monitor.step(loss=torch.tensor(1.0))
            monitor.log({"loss": torch.tensor(1.0), "th_accuracy": torch.tensor(0.5)}, phase="train")
        monitor.log({"loss": torch.tensor(1.0)}, phase="cv")
    (found,) = monitor.findings
    assert (found.code, found.step, found.phase) == ("metric-phase-mismatch", 4, "cv")


@pytest.mark.parametrize(
    "stream",
    [
        ([{"d_loss": 1.0}] * 5 + [{"g_loss": 1.0}]) * 20,
        [{"loss": 1.0, "loss_stage1": 1.0}] * 50 + [{"loss": 1.0, "loss_stage2": 1.0}] * 50,
        [{"loss": 1.0, f"loss_{task}": 1.0} for task in random.Random(0).choices(["asr", "st", "mt", "tts"], k=300)],
        [{"loss": 1.0, f"{task}_loss": 1.0} for task in ["asr", "st", "mt"] * 5 for _ in range(20)],
        [{"loss": 1.0, f"wer_{part}": 1.0} for part in ["clean", "other"] * 9 for _ in range(3)],
    ],
    ids=["critic", "curriculum", "tasks at random", "tasks in turn", "several validation sets"],
)
def test_dictionaries_of_several_kinds_give_no_warning(stream):
    assert follow([("train", metrics) for metrics in stream]) == []


def test_a_few_classes_at_a_time_give_no_warning():
    rng = random.Random(0)
    stream = [("train", {"loss": 1.0})] * 5
    for _ in range(60):
        stream.append(("val", {"loss": 1.0} | {f"iou/class_{i}": 0.5 for i in rng.sample(range(20), 8)}))
    assert [finding for finding in follow(stream) if finding.severity != "info"] == []


def test_settings_of_training_are_no_results_that_validation_lacks():
    settings = dict.fromkeys(
        ("lr/group0", "weight_decay", "wd", "ema_decay", "dropout", "temperature", "progress"), 0.1
    )
    train = [("train", {"loss": 1.0, "skipped_steps": 0, **settings})] * 5
    assert follow([*train, ("val", {"loss": 1.0}), *train]) == []


def test_a_key_that_is_gone_is_said_at_once_where_a_phase_is_one_dictionary():
    full, part = {"loss": 1.0, "acc": 0.5}, {"loss": 1.0}
    train = [("train", full)] * 5
    (found,) = follow([*train, ("val", full), *train, ("val", full), *train, ("val", part)])
    assert (found.code, found.step, found.phase) == ("metric-vanished", 17, "val")


def test_a_batch_without_a_value_among_many_gives_no_warning():
    rng = random.Random(0)
    stream = [{"loss": 1.0} | ({"loss_voiced": 1.0} if rng.random() < 0.95 else {}) for _ in range(500)]
    assert follow([("train", metrics) for metrics in stream]) == []


def loud(stream):
    return codes(finding for finding in follow(stream) if finding.severity != "info")


def rounds(*dictionaries, train=True):
    """A validation after every five steps of training."""
    for each in dictionaries:
        if train:
            yield from [("train", {"loss": 1.0})] * 5
        yield "val", each


@pytest.mark.parametrize("train", [True, False])
def test_a_key_of_the_first_validation_alone_is_said_after_five_without_it(train):
    full, part = {"loss": 1.0, "acc": 0.5, "ppl": 3.0}, {"loss": 1.0, "ppl": 3.0}
    assert loud(rounds(full, *[part] * 4, train=train)) == []
    assert loud(rounds(full, *[part] * 6, train=train)) == [("metric-vanished", "acc")]


@pytest.mark.parametrize(
    "logged",
    [
        pytest.param(([{"loss": 1.0, "acc": 0.5}] + [{"loss": 1.0}] * 4) * 4, id="every fifth"),
        pytest.param([{"loss": 1.0, "num_parameters": 4.0}] + [{"loss": 1.0}] * 20, id="bookkeeping"),
        pytest.param([{"acc": 0.5}] + [{"loss": 1.0}] * 20, id="another dictionary"),
        pytest.param([{"loss": 1.0, "acc": 0.5}] + [{"loss": 1.0}, {"loss": 1.0, "wer": 0.5}] * 10, id="other names too"),
    ],
)  # fmt: skip
def test_what_is_in_the_first_validation_by_chance_is_not_missed(logged):
    assert loud(rounds(*logged, train="loss" in logged[0])) == []


def test_batches_of_one_validation_are_not_compared_with_its_first():
    watch, found = MetricSchema(), []
    state = watch.init()
    for i in range(20):
        metrics = {"loss": 1.0} | ({"acc": 0.5} if i == 0 else {})
        state, said = watch.update(state, [Record(k, v, 3, phase="val", source="log") for k, v in metrics.items()])
        found += said
    assert found == []


@pytest.mark.parametrize(("value", "wrong"), [(0.0, False), (1.0, False), (87.5, False), (-0.2, True), (4800.0, True)])
def test_an_accuracy_beyond_any_unit_needs_no_declaration(value, wrong):
    found = follow([("val", {"loss": 1.0, "accuracy": value})])
    assert codes(found) == ([("metric-range", "accuracy")] if wrong else [])
    assert follow([("val", {"loss": 1.0, "snr_db": value, "wer": abs(value)})]) == []


def evaluated(values, losses=None, train=None, name="loss", kind="float"):
    """A run of which every tenth step is followed by an evaluation: `values(i)` is logged, `losses(i)` was the last training loss."""
    watch, found = MetricSchema(), []
    state = watch.init()
    plan = Record("plan/steps", 100, 0, source="step")
    for i in range(100):
        step = [Record("loss", (losses or (lambda i: 1 / (i + 1)))(i), i, source="step")]
        state, said = watch.update(state, [*([plan] if not i else []), *step])
        if train is not None:
            state, more = watch.update(state, [Record(name, train(i), i, phase="train", source="log", kind="float")])
            said = [*said, *more]
        found += said
        if i % 10 == 9:
            value = values(i)
            kinds = "none" if value is None else "float"
            state, said = watch.update(state, [Record(name, value, i, phase="val", source="log", kind=kinds)])
            found += said
    return [f.code for f in found if f.severity == "warning"]


def test_a_validation_loss_that_is_the_last_training_loss():
    assert evaluated(lambda i: 1 / (i + 1)) == ["metric-phase-mismatch"]
    assert evaluated(lambda i: 1 / (i + 1) + 1e-7) == []
    assert evaluated(lambda i: 0.5, losses=lambda i: 0.5) == []  # a loss that does not move


def test_a_metric_that_training_has_and_validation_never():
    assert evaluated(lambda i: None, train=lambda i: 0.3 + i / 1000, name="accuracy") == ["metric-phase-mismatch"]
    late = evaluated(lambda i: None if i < 20 else 0.5 + i / 1000, train=lambda i: 0.3 + i / 1000, name="accuracy")
    assert late == []


@pytest.mark.parametrize(("settled", "codes"), [(0.98, []), (0.3, ["metric-constant"])])
def test_a_high_accuracy_that_has_settled_is_not_stuck(settled, codes):
    assert evaluated(lambda i: 0.2 if i < 10 else settled, name="accuracy") == codes
