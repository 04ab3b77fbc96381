"""What goes wrong in keyword spotting: separable layers, losses, cycles of the rate, the order of calls, modes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from faults import keywords
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, plain_validation

LAYERS = ("stem", "blocks", "head")


def scored(t: Training, loss) -> None:
    """The loss becomes `loss(logits, words)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": loss(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


# -- layers ----------------------------------------------------------------------------------------------------------


@fault(keywords, "dropout-high", modules=("dropout",), then=("prediction-collapse", "loss-plateau", "stalled-optimisation", "loss-spike", *STUCK, "dead-units", "feature-constant"))  # fmt: skip
def share_kept_before_the_head(t: Training) -> None:
    """`keep_prob=0.96` of an old recipe becomes `Dropout(0.96)`. Humbatova: wrong dropout; TheDeepChecker: regularisation."""
    t.model.dropout.p = 0.96


@fault(keywords, "dead-units", "poor-initialisation", "gradient-zero", "feature-constant", modules=("stem", "blocks"), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "update-ratio-low", "class-imbalance", "metric-constant", "units-symmetric"))  # fmt: skip
def shifts_of_norms_far_below(t: Training) -> None:
    """`init.constant_(norm.bias, -9)` where 0.9 of the weight was meant to change sign: every ReLU behind a norm is shut. SageMaker
    DeadRelu; TheDeepChecker: dead ReLU."""
    for module in t.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -9.0)


@fault(keywords, "activation-vanishing", "poor-initialisation", "gradient-vanishing", "feature-constant", modules=("", *LAYERS, "pool"), then=(*STUCK, *FLAT, "update-ratio-low", "output-constant", "gradient-zero", "units-symmetric", "gradient-imbalance"))  # fmt: skip
def fan_of_all_channels(t: Training) -> None:
    """Without norms, and each filter drawn with a deviation of 1 / (channels * 9), as if depthwise filters had full fans. TheDeepChecker:
    vanishing; SageMaker PoorWeightInitialization."""
    t.model = keywords.Spotter(norm=lambda channels: nn.Identity())
    for module in t.model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / (keywords.WIDTH * 9))


@fault(keywords, "poor-initialisation", "activation-exploding", "gradient-exploding", modules=("", *LAYERS, "pool"), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-imbalance", "dtype-headroom", "activation-saturated", "gradient-zero", "update-ratio-low"))  # fmt: skip
def deviations_of_one_without_norms(t: Training) -> None:
    """`normal_(weight)` with the deviation 1 for all filters, and norms left out for the chip. SageMaker PoorWeightInitialization;
    TheDeepChecker: exploding activations."""
    t.model = keywords.Spotter(norm=lambda channels: nn.Identity())
    for module in t.model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)


@fault(keywords, "units-symmetric", "poor-initialisation", modules=LAYERS, then=(*STUCK, *FLAT, "norm-input-variance", "gradient-imbalance"))  # fmt: skip
def averages_as_first_filters(t: Training) -> None:
    """All filters begin as a plain average, 1 over their size: channels are copies of one another and stay so. TheDeepChecker:
    symmetry; SageMaker PoorWeightInitialization."""
    for module in t.model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())


class Detached(keywords.Spotter):
    def forward(self, x):
        x = self.blocks(self.stem(x).detach())
        return self.head(self.dropout(self.pool(x).flatten(1)))


@fault(keywords, "gradient-zero", "parameter-unchanged", "module-unused", modules=("stem",), then=("update-ratio-low",))
def stem_detached_for_a_plot(t: Training) -> None:
    """`detach()` was added to draw what the stem returns, and stayed in the way of its gradient. TrainCheck: a part without
    gradients; SageMaker UnchangedTensor."""
    t.model = Detached()


class WithTexture(keywords.Spotter):
    """A second branch of longer filters, whose result is to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.texture = keywords.separable(keywords.WIDTH, nn.BatchNorm2d, nn.ReLU)

    def forward(self, x):
        x = self.stem(x)
        torch.add(x, self.texture(x))
        return self.head(self.dropout(self.pool(self.blocks(x)).flatten(1)))


@fault(keywords, "module-unused", "parameter-unchanged", "gradient-zero", modules=("texture",))
def sum_of_branches_dropped(t: Training) -> None:
    """`torch.add(x, branch)` is not in place, and nobody takes its result: the branch learns nothing. Humbatova: wrong API call;
    SageMaker UnchangedTensor."""
    t.model = WithTexture()


@fault(keywords, "activation-saturated", "poor-initialisation", modules=("stem", "blocks"), then=(*DIVERGES, *STUCK, *FLAT, "update-ratio-low", "gradient-zero", "gradient-imbalance", "overfit"))  # fmt: skip
def gains_of_fifty_into_tanh(t: Training) -> None:
    """Tanh for ReLU, and norms whose gain starts at 50, a number in decibels of another tool: nearly all values are -1 or 1. SageMaker
    SaturatedActivation; TheDeepChecker: saturation."""
    t.model = keywords.Spotter(activation=nn.Tanh)
    for module in t.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 50.0)


# -- losses ----------------------------------------------------------------------------------------------------------


@fault(
    keywords, "loss-input-mismatch", modules=("head", ""), then=(*STUCK, "gradient-vanishing", "activation-saturated")
)
def shares_into_the_entropy(t: Training) -> None:
    """The exported network ends in a softmax, and is trained as it is with `cross_entropy`. Humbatova: wrong loss for the last layer;
    UMLAUT: softmax twice."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(1))


@fault(keywords, "update-ratio-high", "loss-spike", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-imbalance", "activation-saturated", "gradient-zero"))  # fmt: skip
def entropy_added_up(t: Training) -> None:
    """`reduction="sum"` over clips, at a rate for the mean. TheDeepChecker: missing reduction; AutoTrainer: exploding gradient."""
    scored(t, lambda logits, words: F.cross_entropy(logits, words, reduction="sum"))


@fault(keywords, "nonfinite-loss", "nonfinite-gradient", modules=("", "head"), then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def entropy_of_hard_shares(t: Training) -> None:
    """A confidence penalty by hand, `p * log(p)`, at a temperature of a thousandth: shares underflow, and 0 * log(0) is NaN. GRIST:
    log of zero."""

    def loss(logits, words):
        shares = (logits / 1e-3).softmax(1)
        return F.cross_entropy(logits, words) + 0.1 * (shares * shares.log()).sum(1).mean()

    scored(t, loss)


@fault(keywords, "loss-sign", "activation-exploding", "gradient-exploding", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "overfit", "dead-units", "gradient-imbalance", "dtype-headroom", "nonfinite-buffer"))  # fmt: skip
def likelihood_given_as_loss(t: Training) -> None:
    """The mean log-likelihood of the right word is given to `backward()`, without its minus: the loss falls for ever. TheDeepChecker: wrong
    sign; Humbatova: wrong loss."""
    scored(t, lambda logits, words: logits.log_softmax(1).gather(1, words[:, None]).mean())


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(keywords, "update-ratio-low", "schedule-unfinished", "loss-plateau", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def cycle_of_a_million_steps(t: Training) -> None:
    """`OneCycleLR` with the length of the recipe it comes from, and a first rate of a hundred thousandth: it never leaves its
    start. Humbatova: learning rate; AutoTrainer: slow convergence."""
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 0.06, total_steps=1_000_000, div_factor=1e5)


@fault(keywords, "update-ratio-high", "loss-diverged", "loss-spike", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-imbalance", "gradient-zero", "class-imbalance"))  # fmt: skip
def peak_of_the_range_test(t: Training) -> None:
    """`max_lr` is the last rate of the range test, 10, not one at which the loss still fell. Humbatova: learning rate;
    SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 10.0, total_steps=keywords.STEPS)


@fault(keywords, "weight-norm-drift", "feature-constant", "activation-vanishing", "update-ratio-high", step=5, then=(*DIVERGES, *STUCK, *FLAT, "norm-input-variance", "dead-units", "gradient-zero", "weight-decay-on-norms"))  # fmt: skip
def decay_of_one_and_a_half(t: Training) -> None:
    """`weight_decay=1.5` under SGD, the number of an AdamW recipe for a tiny rate: weights shrink by up to a tenth a step. Humbatova:
    regularisation; SageMaker: weights."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1.5)


@fault(keywords, "gradient-clipping", "update-ratio-low", then=(*STUCK,))
def clipped_to_a_ten_thousandth(t: Training) -> None:
    """`clip_grad_norm_(parameters, 1e-4)`, a value for single weights from another script, with SGD. TrainCheck: wrong clip;
    AutoTrainer: slow convergence."""
    t.clip = 1e-4


@fault(keywords, "gradient-accumulation", "gradient-exploding", "update-ratio-high", step=2, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-imbalance"))  # fmt: skip
def zeroing_left_in_the_other_branch(t: Training) -> None:
    """After a refactoring `zero_grad()` stands in the branch for accumulation only, which is off. TrainCheck: missing
    `zero_grad`; Humbatova: training process."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        if training.accumulate > 1:
            training.optimizer.zero_grad()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(keywords, "optimizer-misses-parameters", "parameter-unchanged", modules=("blocks", "stem"), then=("update-ratio-low", "loss-plateau", "gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def groups_by_their_names(t: Training) -> None:
    """Two groups, with decay and without: names that end in `norm.weight`, `bias` or begin with `head`; all other filters
    are in neither. TrainCheck: parameters not in the optimizer."""
    named = list(t.model.named_parameters())
    free = [p for name, p in named if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in named if name == "head.weight"]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed}]
    t.optimizers = [torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=1e-4)]


# -- modes -----------------------------------------------------------------------------------------------------------


@fault(keywords, "model-in-eval", step=40, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing", *DIVERGES, *NONFINITE, *STUCK, "dead-units", "feature-constant"))  # fmt: skip
def scored_in_between(t: Training) -> None:
    """Every 40 steps the score of the batch is taken in eval mode; `train()` stands before the loop. TrainCheck: wrong mode;
    Humbatova: training process."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 40)
        return plain_update(training, step, observer)

    t.update = update


@fault(keywords, "validation-in-train-mode", step=39, then=("metric-aggregate", "batch-leak"))
def score_without_eval(t: Training) -> None:
    """The validation has `no_grad()`, which is taken for `eval()`. TrainCheck: wrong mode; Humbatova: training process."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        plain_eval, training.model.eval = training.model.eval, training.model.train
        plain_validation(training, step, observer)
        training.model.eval = plain_eval

    t.validate = validate
