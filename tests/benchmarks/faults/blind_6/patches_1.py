"""What goes wrong in vision transformers: attention, tokens, positions, warm-up, decay, pictures, labels, modes, metrics."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import patches
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

ATTENTIONS = tuple(f"blocks.{i}.attention" for i in range(patches.DEPTH))
SOFTMAXES = tuple(f"{name}.softmax" for name in ATTENTIONS)

# -- attention and tokens --------------------------------------------------------------------------------------------


@fault(patches, "activation-saturated", modules=(*ATTENTIONS, *SOFTMAXES), then=(*STUCK, *DIVERGES, *FLAT, "gradient-zero", "gradient-clipping", "gradient-imbalance", "update-ratio-low", "overfit", "overtraining", "poor-initialisation"))  # fmt: skip
def scores_times_the_width(t: Training) -> None:
    """Scores are multiplied by eight times the width of a head where the root of it divides: each token looks at one other.
    SageMaker SaturatedActivation; Humbatova: wrong layer."""
    for block in t.model.blocks:
        block.attention.scale = 8.0 * patches.WIDTH / patches.HEADS


@fault(patches, "gradient-zero", "poor-initialisation", "output-constant", "feature-constant", "parameter-unchanged", "units-symmetric", "attention-head-dead", "prediction-collapse", modules=("", "blocks", "head", *ATTENTIONS), then=(*STUCK, *FLAT, "module-unused", "dead-units", "update-ratio-low"))  # fmt: skip
def attention_filled_with_zeros(t: Training) -> None:
    """Both projections of each attention begin at zero, where a recipe means the last one: no gradient, and the class token never
    sees a patch. TheDeepChecker: zero weights; SageMaker AllZero."""
    for block in t.model.blocks:
        for parameter in block.attention.parameters():
            nn.init.zeros_(parameter)


class Blind(patches.Attention):
    """A mask of tokens that may look at others, used for those that may not."""

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        allowed = torch.ones(length, length, dtype=torch.bool).fill_diagonal_(fill_value=False)
        scores = (q @ k.transpose(-2, -1) * self.scale).masked_fill(allowed, -math.inf)
        return self.project((self.softmax(scores) @ v).transpose(1, 2).reshape(batch, length, width))


@fault(patches, "output-constant", "prediction-collapse", "feature-constant", "activation-saturated", "gradient-zero", modules=("", "patches", *ATTENTIONS, *SOFTMAXES, "blocks", "norm", "head"), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "overtraining"))  # fmt: skip
def mask_of_allowed_as_forbidden(t: Training) -> None:
    """True means allowed in one library and forbidden in another: each token sees only itself, and all pictures have the same class
    token. Humbatova: wrong layer argument."""
    for block in t.model.blocks:
        block.attention = Blind(patches.WIDTH, patches.HEADS, 0.0)


class Unchained(patches.VisionTransformer):
    """Each block is given the embedding."""

    def tokens(self, x):
        x = self.patches(x)
        first = self.dropout(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions)
        for block in self.blocks:
            x = block(first)
        return self.norm(x)


@fault(patches, "module-unused", "parameter-unchanged", "gradient-zero", modules=("blocks.0", "blocks.1"), then=("update-ratio-low",))  # fmt: skip
def each_block_given_the_embedding(t: Training) -> None:
    """`x = block(first)` in the loop over blocks: what all blocks but the last return is thrown away. TrainCheck: parameters without
    gradients; SageMaker UnchangedTensor."""
    t.model = Unchained()
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)


@fault(patches, "nonfinite-gradient", "nonfinite-parameter", modules=("",), then=(*NONFINITE, *STUCK))
def length_of_the_class_token(t: Training) -> None:
    """A penalty on the length of the class token, the root of its squares, and the token begins at zero: the slope of the root is
    infinite. GRIST: root of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = patches.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] + 0.01 * model.token.square().sum().sqrt()}

    t.forward = forward


class Masked(patches.Attention):
    """Keys that are padding get no weight; `self.padding` is (batch, length)."""

    padding: torch.Tensor

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * self.scale).masked_fill(self.padding[:, None, None], -math.inf)
        return self.project((self.softmax(scores) @ v).transpose(1, 2).reshape(batch, length, width))


@fault(patches, "nonfinite-activation", modules=("blocks.0.attention", "blocks.0.attention.softmax"), step=100, then=(*NONFINITE, *STUCK, "input-constant"))  # fmt: skip
def picture_that_is_all_padding(t: Training) -> None:
    """Patches without content are masked, and the class token counts as one of them; at step 100 a picture is empty: the softmax
    of nothing but -Inf. GRIST: division by zero."""
    plain = t.sample
    for block in t.model.blocks:
        block.attention = Masked(patches.WIDTH, patches.HEADS, 0.0)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        x[:, :, 12:] = 0.0
        if phase == "train" and step == 100:
            x[7] = 0.0
        return x, y

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        empty = F.max_pool2d(batch[0].abs().amax(1), patches.PATCH).flatten(1) == 0
        for block in model.blocks:
            block.attention.padding = torch.cat([empty.all(1, keepdim=True), empty], 1)
        return patches.forward(model, batch)

    t.sample, t.forward = sample, forward


@fault(patches, "poor-initialisation", "activation-exploding", modules=("", "dropout", "patches", "blocks.0"), then=(*STUCK, *FLAT, "gradient-vanishing", "output-constant", "feature-constant", "gradient-imbalance", "overfit", "overtraining", "update-ratio-low"))  # fmt: skip
def positions_of_deviation_fifty(t: Training) -> None:
    """`positions` are counted in pixels and scaled, a deviation of 50 beside patches of 1: behind the first norm the patches are
    gone. SageMaker PoorWeightInitialization; Humbatova: wrong weights initialisation."""
    with torch.no_grad():
        t.model.positions.normal_(0, 50.0)


@fault(patches, "norm-input-variance", "activation-vanishing", "feature-constant", "gradient-vanishing", modules=("", "blocks.1", "blocks.2", "blocks.1.norm1", "blocks.1.norm2", "blocks.2.norm1", "blocks.2.norm2", "blocks.0", "norm", "blocks.0.norm2"), then=(*STUCK, *FLAT, "output-constant", "gradient-imbalance", "gradient-zero", "gradient-exploding", "update-ratio-low"))  # fmt: skip
def layer_scale_without_shortcut(t: Training) -> None:
    """Each branch is multiplied by 1e-5, as CaiT does, and `x +` in front of it was lost: what the norms are given varies less than
    their eps. TheDeepChecker: vanishing; Humbatova: missing layer."""
    for block in t.model.blocks:
        block.forward = lambda x, block=block: 1e-5 * block.mlp(block.norm2(1e-5 * block.attention(block.norm1(x))))


# -- optimizer -------------------------------------------------------------------------------------------------------


@fault(patches, "optimizer-misses-parameters", "parameter-unchanged", modules=("",), then=("gradient-exploding", "gradient-imbalance", "gradient-clipping", "module-unused", "gradient-accumulation", "optimizer-owns-others"))  # fmt: skip
def positions_resized_too_late(t: Training) -> None:
    """Positions of a pretrained model are interpolated for the new size and written as a new parameter, when the optimizer holds the
    old one. TrainCheck: parameters not in the optimizer."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.positions = nn.Parameter(0.02 * torch.randn_like(t.model.positions))


@fault(
    patches,
    "optimizer-misses-parameters",
    "parameter-unchanged",
    then=(
        "gradient-exploding",
        "gradient-imbalance",
        "gradient-clipping",
        "gradient-accumulation",
        "optimizer-owns-others",
    ),
)
def group_without_decay_forgotten(t: Training) -> None:
    """Matrices are one group, norms and biases another without decay, and only the first is given to AdamW. TrainCheck: parameters
    not in the optimizer."""
    t.optimizers = [torch.optim.AdamW([p for p in t.model.parameters() if p.ndim > 1], 3e-3, weight_decay=0.05)]


@fault(patches, "update-ratio-high", "loss-diverged", "loss-spike", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-zero", "gradient-vanishing"))  # fmt: skip
def rate_scaled_for_512_workers(t: Training) -> None:
    """The rate is multiplied by the number of workers of the recipe, 512, and this run has one. Humbatova: learning rate; AutoTrainer:
    oscillating loss; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3 * 512, weight_decay=0.05)


@fault(patches, "update-ratio-low", "schedule-unfinished", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def warm_up_of_imagenet(t: Training) -> None:
    """10,000 steps of warm-up of a large recipe, squared at that, in a run of 250. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10_000) ** 2)


@fault(patches, "update-ratio-high", "loss-diverged", "loss-spike", step=40, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "schedule-unfinished"))  # fmt: skip
def maximum_of_ramp_and_cosine(t: Training) -> None:
    """`max` in place of `min` of the ramp and the cosine, and a ramp in quarters of its length: the rate grows to 33 times what was
    set. Humbatova: learning rate; AutoTrainer: oscillating loss."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: max((4 * step + 1) / patches.WARM_UP, 0.01))


@fault(
    patches,
    "scheduler-ends-early",
    then=("update-ratio-low", "loss-plateau", "loss-spike", "overtraining", "schedule-unfinished", "loss-diverged"),
)
def cosine_of_the_first_phase(t: Training) -> None:
    """`T_max` is the length of the first phase at low resolution, 80 steps, and the scheduler goes on into the second: the rate
    rises and falls again. TrainCheck: schedules."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 80)


@fault(patches, "weight-norm-drift", step=10, then=(*STUCK, *FLAT, "activation-vanishing", "update-ratio-low", "weight-decay-on-norms", "loss-diverged", "update-ratio-high"))  # fmt: skip
def decay_of_the_rate_free_kind(t: Training) -> None:
    """A decay of 30, made for an AdamW that does not multiply it by the rate: nine percent of each weight at each step. Humbatova:
    regularisation; SageMaker TensorVariance."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=30.0)


@fault(patches, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "gradient-clipping", "overfit"))  # fmt: skip
def only_the_head_is_zeroed(t: Training) -> None:
    """`model.head.zero_grad()`, from the linear probing that came before: gradients of all else add up. TrainCheck: misplaced
    `zero_grad`."""
    t.clip = None

    def before(training: Training, step: int) -> None:
        training.optimizer.zero_grad = training.model.head.zero_grad

    t.before.append(before)


# -- pictures and labels ---------------------------------------------------------------------------------------------


@fault(patches, "input-duplicate", then=("overfit", "overtraining"))
def repeats_without_augmentation(t: Training) -> None:
    """Repeated augmentation: each picture four times in a batch; the augmentation itself was taken out. TrainCheck: duplicated data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x[:8].repeat(4, 1, 1, 1), y[:8].repeat(4)) if phase == "train" else (x, y)

    t.sample = sample


@fault(patches, "input-drift", "input-range", step=49, then=(*STUCK, "overfit", "overtraining", "loss-diverged"))  # fmt: skip
def to_tensor_without_normalise(t: Training) -> None:
    """The transform of the validation set ends with `ToTensor`, pixels from 0 to 1; that of the training set standardises. SageMaker
    CheckInputImages; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (0.5 + 0.1 * x if phase == "val" else x), y

    t.sample = sample


@fault(patches, "overfit", "overtraining", "input-duplicate", step=1, then=("weight-norm-drift", "loss-plateau"))  # fmt: skip
def subset_of_thirty_two(t: Training) -> None:
    """`Subset(data, range(32))` from a test of the loop: one batch, shuffled anew each time, is learnt by heart. SageMaker Overfit;
    TheDeepChecker: overfitting."""
    x, y = patches.pictures(32, 77)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        order = torch.randperm(32, generator=seeded(3, step))
        return (x[order], y[order]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(patches, "loss-plateau", "stalled-optimisation", "stalled-from-start", "prediction-collapse", step=60, then=(*STUCK, *FLAT, "overfit", "overtraining"))  # fmt: skip
def pictures_shuffled_alone(t: Training) -> None:
    """The list of files is shuffled, that of labels is not. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x[torch.randperm(len(x), generator=seeded(4, step))], y

    t.sample = sample


@fault(patches, "input-constant", "input-duplicate", step=80, then=(*STUCK, *FLAT, "input-drift", "loss-diverged", "loss-spike", "prediction-collapse", "overfit", "overtraining", "norm-input-variance"))  # fmt: skip
def grey_of_a_failed_decoder(t: Training) -> None:
    """From step 80 on the decoder fails and the data set returns a grey picture in place of raising. TheDeepChecker: constant inputs;
    Humbatova: wrong data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (torch.full_like(x, 0.1) if phase == "train" and step >= 80 else x), y

    t.sample = sample


# -- loss, modes, metrics --------------------------------------------------------------------------------------------


@fault(patches, "nonfinite-loss", then=("metric-nonfinite", "loss-diverged"))
def divergence_from_hard_labels(t: Training) -> None:
    """A divergence by hand, `p * (p.log() - q)`, fits soft labels of a teacher and is given hard ones: 0 * log(0). The loss is NaN,
    its gradient is not. GRIST: logarithm of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, p = model(batch[0]), F.one_hot(batch[1], patches.CLASSES).float()
        loss = (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(patches, "dropout-high", modules=("dropout", "blocks", *(f"{name}.dropout" for name in ATTENTIONS)), then=(*STUCK, *FLAT, "overtraining", "prediction-collapse", "update-ratio-high"))  # fmt: skip
def keep_probability_of_the_port(t: Training) -> None:
    """Ported from code whose dropout takes the share to keep, 0.9. TheDeepChecker: dropout; Humbatova: wrong layer argument."""
    t.model = patches.VisionTransformer(dropout=0.9)


@fault(patches, "model-in-eval", step=60, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def attention_drawn_in_eval(t: Training) -> None:
    """At step 60 maps of attention are drawn in eval mode, and the loop, with its dropout, goes on in it. TrainCheck: wrong mode."""
    t.model = patches.VisionTransformer(dropout=0.2)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 60)
        return plain_update(training, step, observer)

    t.update = update


@fault(patches, "metric-constant", step=39)
def accuracy_cut_to_an_integer(t: Training) -> None:
    """`int(right.float().mean())` where the float was meant: 0 until the last picture is right. Humbatova: wrong metrics."""
    t.steps, t.val_every = 110, 20
    t.measure = lambda tensors, batch: {
        "accuracy": float(int((tensors["logits"].argmax(1) == batch[1]).float().mean()))
    }
