"""What goes wrong with language models: dropout, masks, phases, ties, norms, averages, resumed runs, loss terms."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import language
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update

BLOCKS = ("blocks.0", "blocks.1")


@fault(language, "dropout-high", modules=("blocks.0.dropout", "blocks.1.dropout"), then=(*STUCK, "activation-exploding", "overtraining", "gradient-imbalance", "dead-units"))  # fmt: skip
def nine_tenths_kept(t: Training) -> None:
    """`dropout=0.97`, read as the share that is kept. Humbatova: wrong layer argument; UMLAUT."""
    t.model = language.Language(dropout=0.97)


@fault(language, "validation-in-train-mode", step=49, then=("overtraining",))
def perplexity_with_dropout(t: Training) -> None:
    """The wrapper of the compiled model has an `eval()` of its own that does not reach what it wraps: dropout acts in each validation.
    TrainCheck: wrong mode."""
    t.model = language.Language(dropout=0.3)
    t.model.eval = lambda: t.model


@fault(language, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "overfit", "overtraining", "activation-saturated"))  # fmt: skip
def zeroed_at_full_windows_only(t: Training) -> None:
    """`if (step + 1) % accumulate == 0` guards `zero_grad()` and no longer `step()`, and the window of 64 is from another machine: each
    step repeats up to 63 others. TrainCheck: misplaced `zero_grad`."""
    t.clip = None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 64 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


class Open(language.Attention):
    """Every token sees all others."""

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, language.HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(language.WIDTH // language.HEADS)
        return self.out((self.softmax(scores) @ v).transpose(1, 2).reshape(b, t, -1))


@fault(language, "causality-leak", modules=(*BLOCKS, "blocks", "", *(f"{b}.attention" for b in BLOCKS)), then=("overfit", "overtraining", "activation-saturated"))  # fmt: skip
def encoder_attention(t: Training) -> None:
    """Attention was copied from an encoder and has no causal mask: each token reads the next one, which it shall predict, and the
    loss goes far below the entropy of the source. Humbatova: wrong layer; speech: streaming models that look ahead."""
    for block in t.model.blocks:
        block.attention = Open()


@fault(language, "loss-input-mismatch", modules=("head", "head.1"), then=(*STUCK, "gradient-vanishing", "weight-norm-drift", "overtraining", "gradient-zero", "gradient-imbalance", "activation-saturated"))  # fmt: skip
def cap_of_one(t: Training) -> None:
    """Logits are capped by a tanh, and the factor of 30 in front of it is missing: all scores lie within 1 of zero. Humbatova: wrong
    activation of the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Tanh())


@fault(language, "nonfinite-loss", modules=("",), then=(*NONFINITE, *DIVERGES, "output-constant", "prediction-collapse", "activation-saturated", "step-skipped"))  # fmt: skip
def partition_by_hand(t: Training) -> None:
    """A penalty of the log partition, as in PaLM, whose sum of exponentials is taken by hand, of logits over a temperature of 0.02:
    Inf as soon as one exceeds 1.77. GRIST: overflow of exp."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        partition = (logits / 0.02).exp().sum(-1).log()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()) + 1e-4 * partition.square().mean()
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


class Plain(language.Block):
    """Without residuals."""

    def forward(self, x):
        x = self.dropout(self.attention(self.norm1(x)))
        return self.dropout(self.mlp(self.norm2(x)))


@fault(language, "gradient-vanishing", "feature-constant", "prediction-collapse", "output-constant", modules=("", "blocks", *(f"blocks.{i}" for i in range(12))), then=(*STUCK, *FLAT, "gradient-zero", "gradient-imbalance", "attention-head-dead", "class-imbalance", "update-ratio-low", "overtraining", "poor-initialisation"))  # fmt: skip
def residuals_lost(t: Training) -> None:
    """`x +` was lost in both lines of the block when it was rewritten, and there are twelve of them: what the tokens were is gone
    on the way. TheDeepChecker: vanishing; Humbatova: missing connection."""
    t.model.blocks = nn.ModuleList(Plain(nn.GELU, nn.LayerNorm, 0.0) for _ in range(12))
    t.steps, t.val_every = 120, 40


@fault(language, "optimizer-misses-parameters", "parameter-unchanged", modules=("head",), then=("gradient-accumulation", "gradient-exploding", "gradient-clipping", "optimizer-owns-others"))  # fmt: skip
def untied_behind_the_optimizer(t: Training) -> None:
    """The head is untied from the table for a test, with a copy of its weights, when the optimizer is built already: it has nobody who
    trains it. TrainCheck: parameters that are not in the optimizer; tied weights under FSDP."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.head.weight = nn.Parameter(t.model.embedding.weight.detach().clone())


@fault(language, "loss-sign", "loss-diverged", then=(*DIVERGES, *STUCK, *FLAT, "gradient-clipping", "activation-saturated", "class-imbalance", "gradient-imbalance", "metric-constant", "overtraining", "overfit"))  # fmt: skip
def maximised(t: Training) -> None:
    """`maximize=True`, from the script for rewards: the loss climbs from the first step on. TheDeepChecker: wrong sign; Humbatova: wrong
    optimiser settings."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01, maximize=True)


@fault(language, "poor-initialisation", "feature-constant", "output-constant", "gradient-zero", "activation-vanishing", modules=("norm", *BLOCKS, *(f"{b}.norm{i}" for b in BLOCKS for i in (1, 2))), then=(*STUCK, *FLAT, "parameter-unchanged", "dead-units", "units-symmetric", "module-unused", "gradient-imbalance", "attention-head-dead"))  # fmt: skip
def norms_filled_with_zeros(t: Training) -> None:
    """A function that sets all vectors to zero, for biases, does it with the gains of all norms as well: nothing comes through at the
    start. SageMaker PoorWeightInitialization and AllZero; Humbatova."""
    for parameter in t.model.parameters():
        if parameter.ndim == 1:
            nn.init.zeros_(parameter)


@fault(language, "input-duplicate", then=("feature-constant", "output-constant", "overfit", "overtraining", "loss-plateau"))  # fmt: skip
def collated_by_expand(t: Training) -> None:
    """The loader has one sentence per item, already with a batch axis, and `expand` to the batch size makes sixteen of it. TrainCheck:
    duplicated data; Humbatova: wrong tensor shape."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(part[:1].expand(language.BATCH, -1) for part in batch) if phase == "train" else batch

    t.sample = sample


@fault(language, "parameter-unchanged", "update-ratio-low", then=(*STUCK,))  # fmt: skip
def average_of_decay_one(t: Training) -> None:
    """A running average with a decay of 1.0 is copied back into the model behind each step: it stays what it was at the start.
    TrainCheck: parameters that are not updated; SageMaker UnchangedTensor."""
    average = copy.deepcopy(t.model.state_dict())

    def swap(training: Training, step: int) -> None:
        for name, value in training.model.state_dict().items():
            average[name] = 1.0 * average[name] + 0.0 * value
        training.model.load_state_dict(average)

    t.after_step.append(swap)


@fault(language, "update-ratio-low", "parameter-unchanged", modules=(*BLOCKS, "embedding", "position", "blocks", "head"), then=("loss-plateau", "stalled-optimisation", "gradient-imbalance", "overtraining"))  # fmt: skip
def rates_by_depth(t: Training) -> None:
    """Rates fall by 1e-3 per layer, a typing error for 0.9 in layer-wise decay: nothing below the last norm moves. Humbatova: learning
    rate; SageMaker WeightUpdateRatio."""
    model, rate = t.model, 3e-3
    parts = [[model.norm], [model.blocks[1]], [model.blocks[0]], [model.position, model.embedding]]
    groups = [
        {"params": [p for m in part for p in m.parameters()], "lr": rate * 1e-3**i} for i, part in enumerate(parts)
    ]
    t.optimizers = [torch.optim.AdamW(groups, rate, weight_decay=0.01)]


@fault(
    language,
    "input-drift",
    step=49,
    then=("overfit", "overtraining", "metric-range", "input-duplicate", "class-imbalance"),
)
def validated_on_rare_words(t: Training) -> None:
    """Validation is read by a tokeniser whose words are sorted by another corpus: all its tokens are from the first five of the
    vocabulary. Humbatova: preprocessing that differs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        return (tokens // 4, targets // 4) if phase == "val" else (tokens, targets)

    t.sample = sample


@fault(language, "update-ratio-high", "loss-diverged", "loss-spike", "schedule-restarted", step=150, then=(*DIVERGES, *STUCK, *FLAT, "prediction-collapse", "activation-saturated", "overfit", "overtraining", "gradient-clipping"))  # fmt: skip
def corpus_resumed_with_another_rate(t: Training) -> None:
    """The run is resumed at step 150 with a new optimizer, at the rate of the command line, 0.3, and no warm-up. TrainCheck: checkpoint and
    optimizer; Humbatova: learning rate."""

    def resume(training: Training, step: int) -> None:
        if step == 150:
            training.optimizers[0] = torch.optim.AdamW(training.model.parameters(), 0.3, weight_decay=0.01)
            training.scheduler = LambdaLR(training.optimizer, lambda step: 1.0)

    t.before.append(resume)


@fault(language, "metric-range", step=49)
def hits_in_a_batch(t: Training) -> None:
    """The accuracy is a sum of hits over tokens and a mean over sentences: 6 of 20. Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        hits = (tensors["logits"].argmax(-1) == batch[1]).sum(1).float()
        return {**measured(tensors, batch), "accuracy": float(hits.mean())}

    t.measure = measure


@fault(language, "gradient-zero", "parameter-unchanged", modules=("blocks.0", "position"), then=("update-ratio-low", "module-unused", "loss-plateau", "stalled-optimisation", "overtraining", "gradient-vanishing"))  # fmt: skip
def lower_block_in_no_grad(t: Training) -> None:
    """`with torch.no_grad()` around the lower block, to save memory while the upper one was debugged, is still there. TrainCheck: a part
    without gradients; SageMaker UnchangedTensor."""
    t.model.blocks[0].forward = torch.no_grad()(t.model.blocks[0].forward)


@fault(language, "attention-head-dead", modules=("blocks.0.attention", "blocks.0.attention.out", "blocks.0.attention.qkv", "blocks.0"), then=("units-symmetric", "poor-initialisation", "parameter-unchanged", "module-unused", "feature-constant", "gradient-imbalance", "dead-units", "gradient-zero"))  # fmt: skip
def heads_of_the_smaller_model(t: Training) -> None:
    """Weights of a model with one head are loaded into one with four: the other three of the first block stay the zeros that were allocated,
    in values and in their part of the output. TrainCheck: a partly loaded checkpoint; SageMaker AllZero."""
    attention, part = t.model.blocks[0].attention, language.WIDTH // language.HEADS
    with torch.no_grad():
        attention.qkv.weight[2 * language.WIDTH + part :] = 0
        attention.qkv.bias[2 * language.WIDTH + part :] = 0
        attention.out.weight[:, part:] = 0
