"""What goes wrong in language models: resized tables, adapters, positions, wrong axes, packing, banned tokens, momentum."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from faults import language
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded
from faults.language import BATCH, TOKENS, WIDTH


@fault(language, "optimizer-misses-parameters", "parameter-unchanged", "optimizer-owns-others", modules=("embedding", "head"))  # fmt: skip
def table_resized_too_late(t: Training) -> None:
    """Four special tokens are added, and the table is resized for them, when the optimizer is built already: it holds the old
    table. TrainCheck: huggingface/accelerate#2665; `resize_token_embeddings`."""
    t.optimizers = [t.optimize(t.model.parameters())]
    old = t.model.embedding.weight.detach()
    t.model.embedding = nn.Embedding(TOKENS + 4, WIDTH)
    with torch.no_grad():
        t.model.embedding.weight.copy_(torch.cat([old, old.mean(0).expand(4, -1)]))
    t.model.head = nn.Linear(WIDTH, TOKENS + 4, bias=False)
    t.model.head.weight = t.model.embedding.weight


@fault(language, "optimizer-owns-others", "optimizer-misses-parameters", "parameter-unchanged", then=(*STUCK, "update-ratio-low"))  # fmt: skip
def built_once_more(t: Training) -> None:
    """The model is built once more for `load_state_dict`, after the optimizer was: nothing that the optimizer holds is used.
    TrainCheck: optimizer and parameters."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = copy.deepcopy(t.model)


@fault(language, "model-in-eval", step=60, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def sentence_drawn_in_between(t: Training) -> None:
    """At step 60 a function draws a sentence to look at, and its `eval()` stays, as `train()` is called before the loop only.
    TrainCheck: wrong mode; Humbatova: training process."""
    t.model, modes = language.Language(dropout=0.2), [True]

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(modes[-1])
        return plain_update(training, step, observer)

    def draw(training: Training, step: int) -> None:
        if step == 60:
            training.model.eval()
            modes.append(training.model.training)

    t.update = update
    t.after_step.append(draw)


@fault(language, "poor-initialisation", "activation-saturated", "activation-exploding", "gradient-exploding", modules=("blocks",), then=(*DIVERGES, *STUCK, "gradient-clipping", "update-ratio-low", "attention-head-dead", "gradient-imbalance", "feature-constant"))  # fmt: skip
def deviation_of_two(t: Training) -> None:
    """All linear layers of the blocks are drawn with a deviation of 2.0, where GPT's is 0.02. SageMaker PoorWeightInitialization;
    TheDeepChecker."""
    for module in t.model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=2.0)


@fault(language, "nonfinite-activation", "nonfinite-loss", "output-nonfinite", modules=("blocks.0.attention",), then=(*NONFINITE, "prediction-collapse", "output-constant", "feature-constant"))  # fmt: skip
def softmax_over_heads(t: Training) -> None:
    """`Softmax(1)`, the axis of heads: what is masked is minus infinity in all of them, and its softmax is NaN. Humbatova: wrong
    axis; GRIST: division by zero."""
    for block in t.model.blocks:
        block.attention.softmax = nn.Softmax(1)


@fault(language, "metric-nonfinite", step=49)
def perplexity_of_a_sum(t: Training) -> None:
    """The perplexity is the exponential of the summed loss of all tokens, not of its mean: Inf. GRIST: overflow of exp; Humbatova:
    wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        total = tensors["loss"] * batch[1].numel()
        return {**measured(tensors, batch), "perplexity": float(total.exp())}

    t.measure = measure


@fault(language, "nonfinite-loss", "nonfinite-gradient", "loss-diverged", modules=("",), then=(*NONFINITE, "output-constant", "prediction-collapse"))  # fmt: skip
def entropy_of_banned_tokens(t: Training) -> None:
    """Two tokens are banned by logits of minus infinity, and a bonus for entropy takes `p * log p` of them: 0 times minus infinity.
    GRIST: log(0)."""
    ban = torch.zeros(TOKENS)
    ban[:2] = -math.inf

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        chances = (logits + ban).softmax(-1)
        entropy = -(chances * chances.log()).sum(-1).mean()
        return {"loss": loss - 0.01 * entropy, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(language, "input-constant", "class-imbalance", "input-duplicate", then=(*STUCK, "prediction-collapse", "output-constant", "feature-constant", "overfit", "overtraining", "norm-input-variance"))  # fmt: skip
def padded_left_and_cut_right(t: Training) -> None:
    """Documents are padded on the left and cut on the right, so that of three in four the padding alone is left. SageMaker
    NLPSequenceRatio; TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        full = torch.rand(len(tokens), 1, generator=seeded(81, step, len(phase))) < 0.25
        return tokens * full, targets * full

    t.sample = sample


class Doubled(language.Block):
    """A block whose branches and whose caller add the input."""

    def forward(self, x):
        return x + super().forward(x)


@fault(language, "activation-exploding", modules=("blocks",), then=(*DIVERGES, "poor-initialisation", "gradient-imbalance", "gradient-vanishing", "norm-input-variance", "dtype-headroom", "gradient-clipping", "module-unused", "parameter-unchanged", "update-ratio-low", "feature-constant"))  # fmt: skip
def residual_added_twice(t: Training) -> None:
    """Each of fourteen blocks adds its input, and so does its caller: the signal doubles with each block, and the last ones are
    not heard. TheDeepChecker: exploding activations; SageMaker ExplodingTensor."""
    t.model.blocks = nn.ModuleList(Doubled(nn.GELU, nn.LayerNorm, 0.0) for _ in range(14))
    t.steps = 100


@fault(language, "loss-diverged", "weight-norm-drift", "update-ratio-high", "loss-spike", "gradient-exploding", "activation-exploding", step=30, then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "activation-saturated", "dead-units", "gradient-clipping", "class-imbalance", "attention-head-dead", "overfit", "overtraining"))  # fmt: skip
def momentum_of_one(t: Training) -> None:
    """`momentum=1.0` for 0.9: no step is ever forgotten. Humbatova: wrong optimiser settings; AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=1.0)


class Adapted(nn.Module):
    """A frozen layer, and a difference of rank four."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@fault(language, "gradient-zero", "parameter-unchanged", "units-symmetric", "module-unused", "poor-initialisation", modules=("blocks",), then=("feature-constant", "dead-units", "update-ratio-low", "loss-plateau", "stalled-optimisation", *FLAT))  # fmt: skip
def both_adapters_at_zero(t: Training) -> None:
    """LoRA in which both factors start at zero: each waits for the other one, for ever. TheDeepChecker: zero weights; SageMaker
    UnchangedTensor."""
    for block in t.model.blocks:
        block.attention.qkv, block.mlp[0] = Adapted(block.attention.qkv), Adapted(block.mlp[0])
        for layer in (block.attention.qkv, block.mlp[0]):
            nn.init.zeros_(layer.down.weight)
            nn.init.zeros_(layer.up.weight)


@fault(language, "prediction-collapse", "loss-plateau", "stalled-optimisation", step=60, then=(*STUCK, *FLAT, "class-imbalance", "overfit", "overtraining", "update-ratio-low", "weight-norm-drift"))  # fmt: skip
def targets_of_other_sentences(t: Training) -> None:
    """Tokens are sorted by length in the collate function, targets are not: each sentence has the targets of another. Humbatova:
    wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        return tokens[torch.randperm(len(tokens), generator=seeded(85, step, len(phase)))], targets

    t.sample = sample


@fault(language, "dead-units", "feature-constant", modules=("blocks.0.mlp.1", "blocks.0.mlp"), then=("gradient-zero", "parameter-unchanged", "module-unused", "poor-initialisation", *FLAT))  # fmt: skip
def bias_against_firing(t: Training) -> None:
    """ReLU blocks, and a sparsity bias of -1.0 that was typed as -10: not one unit of the first block fires. SageMaker DeadRelu;
    AutoTrainer: dying ReLU."""
    t.model = language.Language(activation=nn.ReLU)
    nn.init.constant_(t.model.blocks[0].mlp[0].bias, -10.0)
    nn.init.constant_(t.model.blocks[1].mlp[0].bias, -0.1)


@fault(language, "overfit", "overtraining", "input-duplicate", step=100)
def half_a_page(t: Training) -> None:
    """The reader stops at the first empty line: 24 sentences are the whole corpus. SageMaker Overfit; Humbatova: too little
    data."""
    few, plain = language.sentences(24, seeded(87)), t.sample

    def sample(step: int, phase: str) -> Batch:
        rows = few[torch.randperm(24, generator=seeded(87, step))[:BATCH]]
        return (rows[:, :-1], rows[:, 1:]) if phase == "train" else plain(step, phase)

    t.sample = sample
