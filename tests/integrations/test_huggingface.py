import contextlib
import gc
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stethoscope import FindingsError, probes, sinks, watches

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from stethoscope.integrations.huggingface import MonitorTrainerCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
        self.losses, self.bad = [], -1

    def forward(self, x, labels):
        logits = self.body(x)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.training:
            if len(self.losses) == self.bad:
                loss = loss * float("nan")
            self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}


def data(batches=8):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 2)} for i in range(4 * batches)]


def trainer(folder, model, *callbacks, batches=8, evaluate=True, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "epoch" if evaluate else "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **(defaults | options))
    made = transformers.Trainer(
        model, arguments, train_dataset=data(batches), eval_dataset=data(2), callbacks=list(callbacks)
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def hooks(model):
    found = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs)
        for m in model.modules()
    ]
    found += [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return sum(found)


def test_one_batch_is_one_step_with_its_loss_and_the_rate_it_was_made_with(tmp_path):
    model, memory = Net(), sinks.Memory()
    made = trainer(tmp_path, model, MonitorTrainerCallback(sinks=memory, every=4), num_train_epochs=1)
    made.train()
    steps = [r for r in memory.records if r.source == "step"]
    assert [r.value for r in steps if r.name == "loss"] == pytest.approx(model.losses)
    logged = [each["learning_rate"] for each in made.state.log_history if "learning_rate" in each]
    assert [r.value for r in steps if r.name == "lr"] == pytest.approx(logged)
    assert [r.value for r in steps if r.name == "plan/steps"] == [8.0]
    rms = [r.step for r in memory.records if (r.name, r.module, r.phase) == ("activation/rms", "body.0", "train")]
    assert rms == [0, 4]


def test_accumulated_batches_are_one_step_with_their_mean(tmp_path):
    model, memory = Net(), sinks.Memory()
    made = trainer(
        tmp_path, model, MonitorTrainerCallback(None, sinks=memory), num_train_epochs=1, gradient_accumulation_steps=4
    )
    made.train()
    loss = [(r.step, r.value) for r in memory.records if r.name == "loss" and r.source == "step"]
    means = [sum(model.losses[i : i + 4]) / 4 for i in (0, 4)]
    assert loss == [(0, pytest.approx(means[0])), (1, pytest.approx(means[1]))]
    ours = [r.value for r in memory.records if r.name == "loss" and r.source == "log"]
    assert ours == pytest.approx(means, abs=1e-3)


def test_the_training_is_the_same_to_the_last_bit_and_no_hook_is_left(tmp_path):
    results = []
    for callbacks in ((), (MonitorTrainerCallback(sinks=sinks.Memory(), every=3, guard="skip"),)):
        model = Net()
        made = trainer(tmp_path, model, *callbacks, gradient_accumulation_steps=4)
        made.train()
        history = [
            {k: v for k, v in each.items() if "per_second" not in k and "runtime" not in k}
            for each in made.state.log_history
        ]
        results.append((model.losses, [each.tolist() for each in model.parameters()], history, torch.rand(2).tolist()))
        assert hooks(model) == 0
    assert results[0] == results[1]


def test_evaluation_is_a_phase_with_its_own_metrics_and_none_of_them_are_taken_twice(tmp_path):
    model, memory = Net(), sinks.Memory()
    made = trainer(tmp_path, model, MonitorTrainerCallback(sinks=memory, every=1))
    made.train()
    val = [r.step for r in memory.records if (r.name, r.module, r.phase) == ("activation/rms", "body", "val")]
    assert val == [7, 15]
    logged = [(r.step, r.phase) for r in memory.records if r.source == "log" and r.name == "eval_loss"]
    assert logged == [(7, "val"), (15, "val")]
    assert {r.phase for r in memory.records if r.name in ("grad_norm", "train_loss")} == {"train"}


@pytest.mark.slow
def test_its_numbers_reach_report_to_when_it_is_attached(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    made = trainer(tmp_path, Net(), report_to=["tensorboard"], evaluate=False)
    callback = MonitorTrainerCallback(every=2).attach(made)
    assert made.callback_handler.callbacks[0] is callback
    made.train()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    ours = [tag for tag in events.Tags()["scalars"] if "stethoscope" in tag]
    assert "train/stethoscope_activation/rms/body.0" in ours
    assert len(ours) <= 40
    assert "attach" not in caplog.text


def test_numbers_that_cannot_reach_report_to_are_said(tmp_path, caplog):
    made = trainer(tmp_path, Net(), MonitorTrainerCallback(), report_to=["tensorboard"], evaluate=False, max_steps=1)
    made.train()
    assert "callback.attach(trainer)" in caplog.text


def test_a_monitored_metric_that_evaluation_does_not_return_is_said_with_the_nearest_name(tmp_path):
    callback = MonitorTrainerCallback()
    made = trainer(
        tmp_path,
        Net(),
        callback,
        metric_for_best_model="eval_los",
        load_best_model_at_end=True,
        save_strategy="epoch",
        max_steps=8,
    )
    with callback, pytest.raises(KeyError):
        made.train()
    (found,) = [each for each in callback.monitor.findings if each.code == "metric-monitor-unknown"]
    assert found.evidence["nearest"] == "eval_loss"


@pytest.mark.parametrize("way", ["attach", "with"])
def test_an_exception_leaves_no_hook_and_all_that_was_measured(tmp_path, way):
    class Failing(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("in the loop")

    model, backward = Net(), torch.autograd.backward
    callback = MonitorTrainerCallback(sinks=str(tmp_path / "run"))
    made = trainer(tmp_path, model, callback, Failing())
    if way == "attach":
        callback.attach(made)
        with pytest.raises(RuntimeError, match="in the loop"):
            made.train()
    else:
        with callback, pytest.raises(RuntimeError, match="in the loop"):
            made.train()
    assert hooks(model) == 0
    assert torch.autograd.backward is backward
    assert max(delivery.step for delivery in sinks.read(tmp_path / "run")) == 2


def test_a_resumed_training_goes_on_with_steps_run_and_watches(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "evaluate": False, "num_train_epochs": 1}
    first = MonitorTrainerCallback(every=2, sinks=str(tmp_path / "run"))
    trainer(tmp_path, Net(), first, **options).train()
    checkpoint = Path(tmp_path) / "checkpoint-4"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["MonitorTrainerCallback"]
    assert saved["attributes"]["_saved"]["step"] == 4
    memory = sinks.Memory()
    second = MonitorTrainerCallback(every=2, sinks=memory)
    trainer(tmp_path, Net(), second, **options).train(resume_from_checkpoint=str(checkpoint))
    assert sorted({r.step for r in memory.records if r.source == "step"}) == [4, 5, 6, 7]
    states = first.monitor.state_dict(), second.monitor.state_dict()
    assert states[0]["run"] == states[1]["run"]
    assert states[1]["step"] == 8


@pytest.mark.slow
def test_resuming_without_a_state_of_ours_goes_on_at_the_trainers_step(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "evaluate": False, "num_train_epochs": 1}
    trainer(tmp_path, Net(), **options).train()
    memory = sinks.Memory()
    made = trainer(tmp_path, Net(), MonitorTrainerCallback(sinks=memory), **options)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted({r.step for r in memory.records if r.source == "step"}) == [4, 5, 6, 7]


@pytest.mark.slow
def test_a_callback_that_transformers_makes_anew_says_what_it_has_lost(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 4, "evaluate": False, "num_train_epochs": 1}
    trainer(tmp_path, Net(), MonitorTrainerCallback(probes=[probes.Gradients(every=1)]), **options).train()
    made = trainer(tmp_path, Net(), MonitorTrainerCallback(), restore_callback_states_from_checkpoint=True, **options)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "without its probes" in caplog.text


@pytest.mark.parametrize("act", ["raise", pytest.param("skip", marks=pytest.mark.slow)])
def test_the_guard_keeps_a_bad_step_out_of_the_weights(tmp_path, act):
    model, memory = Net(), sinks.Memory()
    model.bad = 5  # the second batch of the second step
    callback = MonitorTrainerCallback(sinks=memory, guard=act)
    made = trainer(tmp_path, model, callback, gradient_accumulation_steps=4, evaluate=False)
    callback.attach(made)
    if act == "raise":
        with pytest.raises(FindingsError):
            made.train()
    else:
        made.train()
        assert [r.value for r in memory.records if r.name == "guard/skipped"][-1] == 1.0
    assert all(each.isfinite().all() for each in model.parameters())
    assert {each.step for each in callback.monitor.findings if each.code.startswith("nonfinite")} >= {1}
    assert hooks(model) == 0


def test_a_nan_is_found_without_a_guard_although_the_trainer_hides_it_from_its_log(tmp_path):
    model = Net()
    model.bad = 3
    callback = MonitorTrainerCallback()
    made = trainer(tmp_path, model, callback, evaluate=False, max_steps=6)
    made.train()
    assert all(math.isfinite(each["loss"]) for each in made.state.log_history if "loss" in each)
    first = callback.monitor.findings[0]
    assert (first.severity, first.step) == ("error", 3)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"preset": "nope"}, ValueError, "Known: "),
        ({"every": 0}, ValueError, "at least 1"),
        ({"guard": "stop"}, ValueError, "'skip'"),
        ({"watches": [watches.NonFinite]}, TypeError, "parentheses"),
        ({"sinks": 3}, TypeError, "Cannot write"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, error, said):
    with pytest.raises(error, match=said):
        MonitorTrainerCallback(**options)


@pytest.mark.slow
def test_a_healthy_language_model_has_nothing_to_say(tmp_path):
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    rows = torch.randint(0, 32, (32, 8)) // 4 * 4
    made = transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, report_to=[], use_cpu=True, disable_tqdm=True,
            learning_rate=0.003, eval_strategy="epoch", save_strategy="no", logging_steps=4, gradient_accumulation_steps=2,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        eval_dataset=[{"input_ids": row, "labels": row} for row in rows[:8]],
    )  # fmt: skip
    callback = MonitorTrainerCallback("full", every=2, sinks=str(tmp_path / "run")).attach(made)
    made.train()
    assert [each for each in callback.monitor.findings if each.severity != "info"] == []


def test_a_trainer_that_fails_and_is_dropped_without_closing_leaves_nothing(tmp_path):
    backward, model = torch.autograd.backward, Net()

    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise OSError("no space left")

    def training():
        made = trainer(tmp_path, model, MonitorTrainerCallback(sinks=sinks.Memory(), every=2), Fails())
        made.train()

    with contextlib.suppress(OSError):
        training()
    gc.collect()
    assert torch.autograd.backward is backward
    assert not hooks(model)
