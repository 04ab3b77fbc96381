"""What goes wrong in retrieval: targets of one row, logarithms of cosines, bounds of the temperature, modes."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults import retrieval
from faults._fault import DIVERGES, FLAT, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, mean_of, plain_update, seeded


@fault(retrieval, "prediction-collapse", "class-imbalance", then=(*STUCK, *FLAT))  # fmt: skip
def every_target_is_zero(t: Training) -> None:
    """Targets are zeros of the right shape where the numbers of rows belong: the first caption of the batch is the answer for all clips.
    Humbatova: wrong labels."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch)
        targets = torch.zeros(len(logits), dtype=torch.long)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        return {"loss": loss, "logits": logits, "targets": targets}

    t.forward = forward


@fault(retrieval, "nonfinite-loss", modules=("",), then=("loss-spike", "loss-diverged", "gradient-exploding"))  # fmt: skip
def logarithm_of_a_cosine(t: Training) -> None:
    """A term takes the logarithm of the cosine of each pair, as if it was a probability, and half of them are below zero. GRIST:
    logarithm of a negative number."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = retrieval.forward(model, batch)
        cosines = tensors["logits"].diagonal() / model.scale.exp()
        return {**tensors, "loss": tensors["loss"] - 0.1 * cosines.log().mean()}

    t.forward = forward


@fault(retrieval, "gradient-zero", "parameter-unchanged", modules=("",), then=("loss-spike", "activation-saturated", "module-unused"))  # fmt: skip
def temperature_behind_its_bound(t: Training) -> None:
    """The temperature starts at 1 / 0.002, and is cut at 100 in `forward`: beyond the bound no gradient comes back, and it never moves.
    TrainCheck: parameters that are not updated; Humbatova: wrong weights initialisation."""
    with torch.no_grad():
        t.model.scale.fill_(math.log(500.0))
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)


@fault(retrieval, "input-constant", "input-duplicate", "input-drift", then=(*STUCK, *FLAT, "overtraining", "audio-silent"))  # fmt: skip
def masks_as_long_as_the_clip(t: Training) -> None:
    """The mask of frames, of up to 24 of them, is drawn three times over clips of 24: most clips are zeros from end to end. Humbatova:
    wrong data augmentation; TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        if phase == "train":
            widths = torch.randint(8, 25, (3, len(frames), 1), generator=seeded(541, step))
            starts = torch.randint(0, 17, (3, len(frames), 1), generator=seeded(542, step)) - 8
            times = torch.arange(frames.shape[1])
            hidden = ((times >= starts) & (times < starts + widths + 8)).any(0)
            frames = frames.masked_fill(hidden[..., None], 0.0)
        return frames, words

    t.sample = sample


@fault(retrieval, "update-ratio-low", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def exponent_of_the_rate(t: Training) -> None:
    """`2e-8` for `2e-3`, a slip of the finger in the file of settings. Humbatova: learning rate; AutoTrainer: not converging."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-8, weight_decay=0.01)


@fault(retrieval, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-clipping"))  # fmt: skip
def zeroed_after_fifty(t: Training) -> None:
    """Accumulation over fifty batches was planned, and `zero_grad()` moved behind its `if`; the step was not. TrainCheck: misplaced
    `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 50 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update, t.clip = update, None


@fault(retrieval, "optimizer-frozen-parameters", modules=("text", "text.embedding", "text.encoder", ""), then=("gradient-zero", "parameter-unchanged", "module-unused"))  # fmt: skip
def text_tower_locked_by_mistake(t: Training) -> None:
    """One tower is to be locked, that of the other pretraining: the text tower, drawn at random, is frozen, and the optimizer is given all.
    TrainCheck: frozen parameters."""
    t.model.text.requires_grad_(False)
    t.optimizers = [torch.optim.AdamW(t.model.parameters(), 2e-3, weight_decay=0.01)]


@fault(retrieval, "dropout-high", modules=("text.encoder", "text.encoder.dropout", "text.encoder.dropout1", "text.encoder.dropout2", "text.encoder.self_attn"), then=(*STUCK, "loss-spike", "activation-exploding", "gradient-imbalance", "gradient-vanishing", "attention-head-dead"))  # fmt: skip
def dropout_of_ninety_five(t: Training) -> None:
    """0.95 is the share to keep, and goes to the text tower as the share to drop. Humbatova: wrong regularisation."""
    t.model.text = retrieval.TextTower(0.95)


@fault(retrieval, "weight-norm-drift", "activation-vanishing", "update-ratio-high", step=3, then=(*DIVERGES, *STUCK, *FLAT, "weight-decay-on-norms", "dead-units", "attention-head-dead", "gradient-imbalance", "gradient-zero"))  # fmt: skip
def decay_of_fifty(t: Training) -> None:
    """A decay of 0.1 is divided by the rate, for a library that multiplies by it twice: 50. TheDeepChecker: weights that vanish;
    Humbatova: regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=50.0)


@fault(retrieval, "optimizer-duplicate-parameters", modules=("audio.project", "text.project", ""))  # fmt: skip
def projections_in_two_optimizers(t: Training) -> None:
    """Both projections have an optimizer with a rate of their own, and are in the general one as well. TrainCheck: parameters in two
    optimizers."""
    heads = [*t.model.audio.project.parameters(), *t.model.text.project.parameters()]
    t.optimizers = [torch.optim.AdamW(t.model.parameters(), 2e-3), torch.optim.AdamW(heads, 1e-3)]
    t.before.append(lambda training, step: training.optimizers[1].zero_grad())
    t.after_step.append(lambda training, step: training.optimizers[1].step())


@fault(retrieval, "validation-in-train-mode", step=49)
def recall_with_dropout(t: Training) -> None:
    """The function that computes recall on a whole set forgot `eval()`: BatchNorm takes its clips into the statistics, and words are
    dropped. TrainCheck: wrong mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            seen = [training.sample(step * 2 + i, "val") for i in range(2)]
            tensors = [training.forward(training.model, batch) for batch in seen]
        metrics = [training.measure(given, batch) for given, batch in zip(tensors, seen, strict=True)]
        shown = {name: mean_of([each[name] for each in metrics]) for name in metrics[0]}
        observer.log({"loss": mean_of([float(given["loss"]) for given in tensors]), **shown}, "val", step)

    t.validate = validate


@fault(retrieval, "dead-units", "feature-constant", "gradient-zero", "poor-initialisation", modules=("audio.norm1", "audio.activation1", "audio.conv1", "audio"), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "stalled-from-start", "update-ratio-low"))  # fmt: skip
def shift_of_minus_six(t: Training) -> None:
    """Biases of the first normalisation are those of a layer in front of a sigmoid, -6: in front of a ReLU nothing is left of the clip.
    SageMaker DeadRelu; TheDeepChecker: dead units."""
    nn.init.constant_(t.model.audio.norm1.bias, -6.0)


@fault(retrieval, "input-drift", "input-constant", "audio-silent", step=49, then=("overfit", "overtraining", "input-duplicate", "norm-input-variance", "feature-constant", "prediction-collapse"))  # fmt: skip
def validation_clips_not_mounted(t: Training) -> None:
    """The folder of validation clips is not mounted, and the reader returns silence for a file that it cannot open. Speech: silent
    segments; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        return (torch.zeros_like(frames) if phase == "val" else frames), words

    t.sample = sample


@fault(retrieval, "units-symmetric", "poor-initialisation", modules=("text", "text.encoder", "text.encoder.linear1", "text.encoder.linear2"), then=(*FLAT, "gradient-imbalance"))  # fmt: skip
def feed_forward_of_ones(t: Training) -> None:
    """Weights of the text tower's feed-forward layers are ones over their width, a placeholder that was never replaced: 64 units are
    one. TheDeepChecker: symmetric units."""
    for layer in (t.model.text.encoder.linear1, t.model.text.encoder.linear2):
        nn.init.constant_(layer.weight, 1 / layer.in_features)
        nn.init.zeros_(layer.bias)
    t.model.text.encoder.dropout.p = 0.0


@fault(retrieval, "parameter-unchanged", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "step-skipped", "gradient-zero", "optimizer-owns-others"))  # fmt: skip
def only_the_schedule_is_stepped(t: Training) -> None:
    """`scheduler.step()` was put in place of `optimizer.step()`, and not after it. TrainCheck: parameters that are not updated; SageMaker
    UnchangedTensor."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.step = lambda closure=None: None
        return plain_update(training, step, observer)

    t.schedule = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    t.update = update
