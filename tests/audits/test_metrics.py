"""`audits.metrics` on code of the shape of wenet-e2e/wenet: a forward that returns a dictionary, an executor that reads it."""

import functools
import random

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from stethoscope import audits
from stethoscope.watches import Field, MetricSchema


class Transducer(nn.Module):
    """Batch (B, 8) -> the metrics of a model with several losses."""

    def __init__(self, history=0):
        super().__init__()
        self.history = history
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, batch):
        logits = self.body(batch)
        loss_ctc = logits.square().mean()
        if self.history == 1:
            loss_ctc = (loss_ctc, logits.softmax(-1))
            return {"loss": 0.3 * loss_ctc.sum()}
        accuracy = (logits.argmax(-1) == 0).float().mean()
        metrics = {"loss": loss_ctc, "loss_ctc": loss_ctc, "th_accuracy": accuracy}
        if self.history in {2, 4}:
            del metrics["th_accuracy"]
        if self.history == 3:
            metrics["th_accuracy"] = None
        if self.history == 5:
            metrics["loss"] = loss_ctc.item()
        return metrics


class Executor:
    def __init__(self, model, history=0):
        self.model, self.history = model, history
        self.optimizer = torch.optim.AdamW(model.parameters())

    def train(self, batch):
        metrics = self.model(batch)
        if self.history != 5:
            metrics["loss"].backward()
        return metrics

    def cv(self, batch):
        metrics = self.model(batch)
        torch.isfinite(metrics["loss"])
        if self.history == 4:
            accuracy = metrics.get("th_accuracy", 0.0)
        elif self.history == 3:
            accuracy = metrics["th_accuracy"] or 0.0
        else:
            accuracy = metrics["th_accuracy"]
        return {"loss": metrics["loss"], "loss_ctc": metrics["loss_ctc"], "acc": accuracy}


def audit(history, schema=None):
    torch.manual_seed(0)
    executor = Executor(Transducer(history), history)
    return audits.metrics(executor.train, executor.cv, torch.randn(4, 8), torch.randn(5, 8), schema)


def test_healthy_code_has_nothing_to_say():
    report = audit(0)
    assert report.findings == ()
    assert report.ok
    assert list(report.train) == ["loss", "loss_ctc", "th_accuracy"]
    assert list(report.val) == ["loss", "loss_ctc", "acc"]
    assert "train: loss, loss_ctc, th_accuracy" in str(report)


def test_history_1_a_tuple_has_no_sum():
    report = audit(1)
    assert {finding.code for finding in report.findings} == {"metric-type"}
    assert "'tuple' object has no attribute 'sum'" in report.findings[0].message
    assert "test_metrics.py" in report.findings[0].evidence["where"]


def test_history_2_a_key_error_comes_before_training():
    (found,) = audit(2).findings
    assert (found.code, found.severity, found.phase) == ("metric-missing", "error", "val")
    assert found.evidence["metric"] == "th_accuracy"
    assert found.evidence["exception"] == "KeyError: 'th_accuracy'"
    assert found.evidence["given"] == ["loss", "loss_ctc"]


def test_history_3_none_that_becomes_zero():
    (found,) = audit(3).findings
    assert (found.code, found.severity) == ("metric-phase-mismatch", "warning")
    assert (found.evidence["train"], found.evidence["val"]) == ("none", 0.0)


def test_history_4_a_default_that_hides_a_missing_key():
    report = audit(4)
    missing = next(finding for finding in report.findings if finding.code == "metric-missing")
    assert (missing.severity, missing.phase) == ("warning", "val")
    assert missing.evidence["metric"] == "th_accuracy"
    assert missing.evidence["default"] is True
    assert not report.ok


def test_history_5_a_float_where_a_tensor_is_needed():
    (found,) = audit(5).findings
    assert (found.code, found.severity, found.phase) == ("metric-type", "error", "val")
    assert "must be Tensor, not float" in found.message


def test_nothing_is_left_behind():
    torch.manual_seed(0)
    model = Transducer()
    executor = Executor(model)
    executor.train(torch.randn(4, 8))
    executor.optimizer.step()

    def train(batch):  # a step that does more than it should
        random.random()
        np.random.rand()
        metrics = executor.train(batch)
        executor.optimizer.step()
        return metrics

    frozen = model.body[1]
    frozen.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [(weight.grad, weight.grad.clone()) for weight in model.parameters()]
    steps = [state["step"].clone() for state in executor.optimizer.state.values()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    report = audits.metrics(train, executor.cv, torch.randn(4, 8), torch.randn(4, 8))
    assert report.ok
    torch.set_rng_state(states[2])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for weight, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert weight.grad is gradient
        assert torch.equal(gradient, value)
    assert [state["step"] for state in executor.optimizer.state.values()] == steps
    assert model.training
    assert not frozen.training
    assert not model._forward_hooks


GLOBAL = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
DATA = list(range(20_000))


def by_global(batch):
    DATA[0] += 0
    return {"loss": GLOBAL(batch).mean()}


class Nested:
    def __init__(self, model):
        self.data, self.parts = DATA, {"models": [model]}

    def step(self, batch):
        return {"loss": self.parts["models"][0](batch).mean()}


@pytest.mark.parametrize("how", ["global", "closure", "partial", "default", "bound", "module"])
def test_a_model_is_reached_and_put_back(how):
    model = GLOBAL if how == "global" else nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))

    def closure(batch):
        return {"loss": model(batch).mean()}

    def default(batch, model=model):
        return {"loss": model(batch).mean()}

    def with_model(model, batch):
        return {"loss": model(batch).mean()}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return {"loss": self.inner(batch).mean()}

    step = {
        "global": by_global,
        "closure": closure,
        "partial": functools.partial(with_model, model),
        "default": default,
        "bound": Nested(model).step,
        "module": Both(),
    }[how]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert audits.metrics(step, step, torch.randn(4, 8), torch.randn(4, 8)).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_random_state_and_gradients_are_put_back_after_an_exception():
    model = Transducer(history=2)
    executor = Executor(model)
    state = torch.get_rng_state()
    batches = torch.ones(4, 8), torch.ones(4, 8)
    assert not audits.metrics(executor.train, executor.cv, *batches).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert not model._forward_hooks
    assert model.training


def test_a_training_is_the_same_with_and_without_the_audit():
    def run(*, audited):
        torch.manual_seed(3)
        model = Transducer()
        executor = Executor(model)
        if audited:
            batch = torch.ones(4, 8)
            audits.metrics(executor.train, executor.cv, batch, batch)
        for _ in range(3):
            executor.train(torch.randn(4, 8))
            executor.optimizer.step()
            executor.optimizer.zero_grad()
        return torch.cat([weight.flatten() for weight in model.state_dict().values()])

    assert torch.equal(run(audited=False), run(audited=True))


def test_validation_runs_without_gradients_in_eval_mode():
    model = Transducer()
    seen = {}

    def val(batch):
        seen.update(grad=torch.is_grad_enabled(), training=model.training)
        return model(batch)

    audits.metrics(model, val, torch.randn(4, 8), torch.randn(4, 8))
    assert seen == {"grad": False, "training": False}


def test_a_key_that_a_batch_lacks_is_no_missing_metric():
    model = Transducer()

    def step(batch):
        return {"loss": model(batch["feats"])["loss"], "n": batch["lengths"]}

    (found, _) = audits.metrics(step, step, {"feats": torch.ones(4, 8)}, {"feats": torch.ones(4, 8)}).findings
    assert found.code == "metric-step-failed"

    def first(batch):
        return {"n": batch["lengths"], **model(batch["feats"])}  # before the model has been called

    (found, _) = audits.metrics(first, first, {"feats": torch.ones(4, 8)}, {"feats": torch.ones(4, 8)}).findings
    assert found.code == "metric-step-failed"


def test_a_declaration_is_checked_in_both_phases():
    schema = MetricSchema({"loss": float, "th_accuracy": Field(float, ge=0.6, le=1.0), "wer": float})
    codes = {(finding.code, finding.phase) for finding in audit(0, schema).findings}
    assert {("metric-missing", "train"), ("metric-missing", "val"), ("metric-range", "train")} <= codes


def test_the_lock_file_is_written_once_and_then_kept_to(tmp_path):
    path = tmp_path / "schema.lock.json"
    assert audit(0, MetricSchema(lock=path)).ok
    locked = MetricSchema(lock=path)
    assert {"loss", "loss_ctc", "th_accuracy"} <= set(locked.declared)
    assert audit(0, locked).ok
    written = path.read_text()
    assert not audit(2, locked).ok
    assert path.read_text() == written


def test_any_other_exception_is_reported_with_its_place():
    def broken(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    (first, second) = audits.metrics(broken, broken, 1, 2).findings
    assert (first.code, first.phase, second.phase) == ("metric-step-failed", "train", "val")
    assert "in broken" in first.message


@pytest.mark.parametrize("returned", [3.0, None, [1.0], {1: 2.0}])
def test_a_step_that_returns_no_dictionary_is_a_wrong_type(returned):
    report = audits.metrics(lambda batch: returned, lambda batch: {"loss": 1.0}, 1, 2)
    assert report.findings[0].code == "metric-type"


def test_empty_metrics_are_said():
    report = audits.metrics(lambda batch: {"loss": 1.0}, lambda batch: {}, 1, 2)
    assert [finding.code for finding in report.findings] == ["metric-missing"]


def _rank(rank, path, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

    def step(batch):
        return {"loss": 1.0} | ({"aux": 2.0} if rank else {})

    report = audits.metrics(step, step, 1, 2)
    queue.put((rank, [(finding.code, finding.evidence["missing_on"]) for finding in report.findings]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_different_keys_are_told_before_training(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(60)
    for _, found in results:
        assert found == [("metric-ranks", [0]), ("metric-ranks", [0])]
