"""What goes wrong in language models: schedules, clipping, embeddings, attention, optimizer state, precision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from faults import language
from faults._fault import DIVERGES, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


@fault(language, "loss-diverged", "update-ratio-high", "loss-spike", "activation-exploding", "gradient-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, "dead-units", "gradient-vanishing", "activation-saturated", "feature-constant"))  # fmt: skip
def no_warm_up(t: Training) -> None:
    """A learning rate of 0.3 at once, without warm-up and clipping. TheDeepChecker: diverging."""
    t.optimize, t.schedule, t.clip = (lambda p: torch.optim.AdamW(p, 0.3)), None, None


@fault(language, "gradient-clipping", "update-ratio-low", "loss-plateau", "stalled-optimisation", step=10, then=STUCK)
def clipped_to_nothing(t: Training) -> None:
    """`clip_grad_norm_(..., 1e-3)` under plain SGD: every step is clipped a thousand times. TrainCheck: clipping."""
    t.optimize, t.schedule, t.clip = (lambda p: torch.optim.SGD(p, 0.3)), None, 1e-3


@fault(language, "update-ratio-low", "stalled-optimisation", "loss-plateau", "schedule-unfinished", "scheduler-ends-early", "parameter-unchanged", step=40, then=STUCK)  # fmt: skip
def schedule_in_epochs(t: Training) -> None:
    """A cosine over 30 epochs that is stepped at every optimizer step: the rate is zero from step 30 on. Humbatova."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / 30)))


@fault(language, "poor-initialisation", "activation-exploding", "activation-saturated", "gradient-exploding", modules=("embedding", "head"), then=(*DIVERGES, *STUCK, "gradient-clipping", "update-ratio-low"))  # fmt: skip
def embedding_too_large(t: Training) -> None:
    """The tied table starts at a deviation of 100: logits of thousands. SageMaker PoorWeightInitialization."""
    nn.init.normal_(t.model.embedding.weight, std=100.0)


@fault(language, "activation-saturated", "attention-head-dead", modules=("blocks.0.attention",), then=("gradient-vanishing", "gradient-imbalance", "poor-initialisation"))  # fmt: skip
def attention_not_scaled(t: Training) -> None:
    """Queries and keys 30 times too large: each softmax is one-hot. SageMaker SaturatedActivation."""
    with torch.no_grad():
        t.model.blocks[0].attention.qkv.weight[: 2 * language.WIDTH] *= 30


@fault(language, "parameter-changed", modules=("position",), step=1)
def frozen_table_moves(t: Training) -> None:
    """The table of positions is frozen, but a rescaling of all parameters after each step does not ask. TrainCheck."""
    t.model.position.weight.requires_grad_(False)

    def rescale(training: Training, step: int) -> None:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.mul_(0.999)

    t.after_step.append(rescale)


@fault(language, "metric-missing", "metric-vanished", "metric-phase-mismatch", step=99)
def metric_vanishes(t: Training) -> None:
    """The accuracy is in the first validation's dictionary and in no later one. Speech: wenet-e2e/wenet#2430."""
    measured, calls = t.measure, []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        calls.append(1)
        metrics = measured(tensors, batch)
        return metrics if len(calls) <= 2 else {"perplexity": metrics["perplexity"]}

    t.measure = measure


@fault(language, "overfit", "overtraining", "input-duplicate", step=100, then=("class-imbalance",))
def same_batch_forever(t: Training) -> None:
    """The iterator is made anew at each step: always the first batch. TrainCheck: data order; SageMaker Overfit."""
    plain = t.sample
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)


@fault(language, "class-imbalance", "prediction-collapse", "output-constant", step=110, then=("input-drift", "overfit", "overtraining", "gradient-vanishing", "gradient-zero", "loss-plateau", "activation-saturated"))  # fmt: skip
def targets_are_padding(t: Training) -> None:
    """From step 100 on a collate function writes the padding token over all targets. Humbatova: wrong targets."""
    plain = t.sample

    def sample(step: int, phase: str):
        tokens, targets = plain(step, phase)
        return tokens, (torch.zeros_like(targets) if phase == "train" and step >= 100 else targets)

    t.sample = sample


@fault(language, "nonfinite-optimizer", "nonfinite-parameter", modules=("", "blocks.1.mlp.0"), step=100, then=NONFINITE)  # fmt: skip
def optimizer_state_spoilt(t: Training) -> None:
    """A second moment becomes NaN at step 100, as after a bad restart. TrainCheck: checkpoint and optimizer state."""

    def spoil(training: Training, step: int) -> None:
        if step == 100:
            parameter = training.model.blocks[1].mlp[0].weight
            training.optimizer.state[parameter]["exp_avg_sq"][0, 0] = math.nan

    t.before.append(spoil)


@fault(language, "gradient-zero", "dtype-headroom", "gradient-vanishing", then=(*STUCK, "update-ratio-low", "parameter-unchanged"))  # fmt: skip
def half_without_scaling(t: Training) -> None:
    """float16 without a gradient scaler, and a loss divided once more by the number of tokens: gradients
    underflow. TrainCheck: mixed precision."""
    t.precision, t.schedule, t.clip = torch.float16, None, None
    t.optimize = lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = language.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] / (batch[1].numel() * 100)}

    t.forward = forward


@fault(language, "gradient-zero", "module-unused", "feature-constant", "dead-units", modules=("blocks.1.mlp",))  # fmt: skip
def branch_times_zero(t: Training) -> None:
    """An ablation was never taken back: the second block's feed-forward branch is multiplied by zero. SageMaker AllZero."""
    t.model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 0.0)


@fault(language, "norm-input-variance", "activation-vanishing", "feature-constant", modules=("embedding", "position", "blocks.0"), then=("gradient-vanishing", "gradient-zero", "gradient-imbalance", "poor-initialisation", "dead-units"))  # fmt: skip
def tables_scaled_away(t: Training) -> None:
    """Both tables are divided by 1e5 on their way in, so that the first normalisation sees its epsilon only. Humbatova."""
    for table in (t.model.embedding, t.model.position):
        table.register_forward_hook(lambda module, args, output: output * 1e-5)


@fault(language, "nonfinite-activation", "nonfinite-parameter", "activation-exploding", modules=("blocks.0.mlp", "blocks.0"), step=90, then=(*NONFINITE, *DIVERGES))  # fmt: skip
def bit_flip(t: Training) -> None:
    """One weight of one layer becomes 1e38 at step 90. TrainCheck: hardware; speech: microsoft/unilm#1672."""

    def flip(training: Training, step: int) -> None:
        if step == 90:
            training.model.blocks[0].mlp[0].weight.data[0, 0] = 1e38

    t.before.append(flip)
