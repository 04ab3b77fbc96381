"""What goes wrong in language models: vocabularies, schedules, scales of the loss, smoothing, shards."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import language
from faults._fault import FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, seeded


@fault(language, "class-imbalance", "prediction-collapse", "output-constant", then=(*STUCK, *FLAT, "input-duplicate", "attention-head-dead", "dead-units", "gradient-imbalance", "overfit", "overtraining"))  # fmt: skip
def another_vocabulary(t: Training) -> None:
    """The tokeniser is that of another model: but for two tokens everything is unknown, and the unknown token is what the
    model says. Humbatova: wrong preprocessing; SageMaker ClassImbalance."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(part * (part < 3) for part in plain(step, phase))


@fault(language, "update-ratio-low", "scheduler-ends-early", "loss-plateau", "stalled-optimisation", "parameter-unchanged", "schedule-unfinished", then=STUCK)  # fmt: skip
def schedule_of_micro_batches(t: Training) -> None:
    """Four micro-batches make a step, and `scheduler.step()` stands in the inner loop: the linear decay is at zero after a
    quarter of the run. Humbatova: learning rate; TrainCheck: accumulation."""
    t.accumulate, t.steps = 4, 200
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 200))

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad()
        for part in range(training.accumulate):
            batch = training.sample(step * training.accumulate + part, "train")
            tensors = training.forward(training.model, batch)
            (tensors["loss"] / training.accumulate).backward()
            if part:
                training.scheduler.step()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(language, "nonfinite-gradient", "nonfinite-parameter", "dtype-headroom", "step-skipped", modules=("", "embedding", "head", "blocks", "norm"), then=(*NONFINITE, "prediction-collapse", "output-constant", "class-imbalance"))  # fmt: skip
def scale_of_the_loss_by_hand(t: Training) -> None:
    """float16 with a fixed scale of 2**24, and gradients are divided by it again without a look for Inf. TrainCheck: mixed
    precision; GRIST: overflow."""
    t.precision, t.steps = torch.float16, 150

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        with training.autocast():
            tensors = training.forward(training.model, batch)
        (tensors["loss"] * 2**24).backward()
        for parameter in training.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2**24
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(language, "loss-plateau", "stalled-optimisation", "stalled-from-start", "output-constant", "feature-constant", "prediction-collapse", then=(*STUCK, *FLAT, "weight-norm-drift", "update-ratio-low", "gradient-zero", "class-imbalance", "attention-head-dead"))  # fmt: skip
def labels_smoothed_away(t: Training) -> None:
    """`label_smoothing=1.0`, a typing error for 0.1: all tokens are equally right. Humbatova: wrong loss; UMLAUT."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), label_smoothing=1.0)
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(language, "loss-spike", "gradient-exploding", step=10, then=("gradient-clipping", "loss-diverged", "loss-plateau", "update-ratio-high", "overfit"))  # fmt: skip
def shard_that_was_not_decoded(t: Training) -> None:
    """One shard of twenty is still compressed: at every 20th step the tokens are noise, and the loss leaps. Humbatova: wrong
    data; TheDeepChecker: corrupt data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        if phase == "train" and step % 20 == 10:
            noise = torch.randint(language.TOKENS, (len(tokens), language.TIME + 1), generator=seeded(71, step))
            return noise[:, :-1], noise[:, 1:]
        return tokens, targets

    t.sample = sample
