"""What goes wrong in image classifiers: modes, frozen layers, clipping, losses, axes, what the loader hands over."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from faults import classifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import (
    Batch,
    Observer,
    Tensors,
    Training,
    clipped_before_unscaling_update,
    finish_update,
    plain_update,
)


@fault(classifier, "model-in-eval", step=50, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))  # fmt: skip
def eval_never_left(t: Training) -> None:
    """`model.train()` is called once, before the first epoch; the validation at step 50 leaves `eval()` on. TrainCheck:
    wrong mode; tk-rusch/coRNN#1, pytorch/tutorials#1624."""
    t.model = classifier.Classifier(dropout=0.4)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 50)
        return plain_update(training, step, observer)

    t.update = update


@fault(classifier, "parameter-changed", modules=("block1", "block2"), step=100, then=("gradient-zero", "optimizer-frozen-parameters"))  # fmt: skip
def frozen_with_momentum(t: Training) -> None:
    """Two blocks are frozen at step 100 by `requires_grad_(False)`, with `zero_grad(set_to_none=False)`: momentum and decay
    move them on. TrainCheck: frozen parameters that change."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=5e-3)

    def freeze(training: Training, step: int) -> None:
        if step == 0:
            training.optimizer.zero_grad = partial(training.optimizer.zero_grad, set_to_none=False)
        if step == 100:
            training.model.block1.requires_grad_(False)
            training.model.block2.requires_grad_(False)

    t.before.append(freeze)


@fault(classifier, "gradient-clipping", "update-ratio-low", "loss-plateau", "stalled-optimisation", "parameter-unchanged", step=10, then=(*STUCK, "gradient-exploding", "dtype-headroom", "step-skipped"))  # fmt: skip
def scaled_gradients_clipped(t: Training) -> None:
    """Gradients are clipped to 1 before they are unscaled, thus to 1 / 65536. TrainCheck: mixed precision;
    milesial/Pytorch-UNet#468, pytorch/examples#1196."""
    t.precision, t.scaled, t.steps = torch.float16, True, 150

    t.update = clipped_before_unscaling_update


@fault(classifier, "feature-constant", "prediction-collapse", "output-constant", modules=("dropout", "head", ""), then=(*STUCK, "gradient-vanishing", "class-imbalance"))  # fmt: skip
def mean_over_the_batch(t: Training) -> None:
    """Features are averaged over axis 0, meant for the patches of one picture: all items of a batch get one answer.
    Humbatova: wrong axis."""
    t.model.dropout.register_forward_hook(lambda module, args, output: output.mean(0, keepdim=True).expand_as(output))


@fault(classifier, "dead-units", "update-ratio-high", "loss-diverged", "loss-spike", "gradient-exploding", "activation-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "module-unused", "poor-initialisation", "class-imbalance"))  # fmt: skip
def relus_killed_by_steps(t: Training) -> None:
    """Adam at 0.1 without normalisation: the first steps push all biases below zero, and nothing comes back. AutoTrainer:
    dying ReLU; SageMaker DeadRelu."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    t.optimize = lambda p: torch.optim.Adam(p, 0.1)


@fault(classifier, "gradient-vanishing", "gradient-imbalance", "loss-plateau", "stalled-optimisation", modules=("block1", "block2", ""), then=(*STUCK, "feature-constant", "activation-vanishing", "activation-saturated", "update-ratio-low", "poor-initialisation", "gradient-zero", "class-imbalance", "parameter-unchanged"))  # fmt: skip
def sigmoids_all_the_way(t: Training) -> None:
    """Ten more layers with sigmoids and without normalisation. AutoTrainer: vanishing gradient; TheDeepChecker."""
    nothing = lambda channels: nn.Identity()  # noqa: E731 - one line beside its use
    t.model = classifier.Classifier(norm=nothing, activation=nn.Sigmoid)
    deeper = (classifier.block(16, 16, 1, nothing, nn.Sigmoid) for _ in range(10))
    t.model.block2 = nn.Sequential(t.model.block2, *deeper)


@fault(classifier, "input-duplicate", "overfit", "overtraining")
def workers_share_a_seed(t: Training) -> None:
    """Eight workers draw with one NumPy seed: a batch of 32 holds four pictures, each eight times. TrainCheck: data of
    workers; pytorch/pytorch#5059."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x[:4].repeat(8, 1, 1, 1), y[:4].repeat(8)) if phase == "train" else (x, y)

    t.sample = sample


class Cosine(nn.Linear):
    """Similarities of features and classes, times 64, as in the losses of face recognition."""

    def forward(self, x):
        return 64 * F.linear(F.normalize(x), F.normalize(self.weight))


@fault(classifier, "nonfinite-gradient", "nonfinite-parameter", modules=("", "head"), then=(*NONFINITE, "activation-saturated", "gradient-exploding", "poor-initialisation", "prediction-collapse", "output-constant"))  # fmt: skip
def focal_with_a_root(t: Training) -> None:
    """A focal loss with an exponent of one half: its slope is infinite for an item that is certain, and with similarities
    times 64 the first such items come soon. GRIST: power with an exponent below one."""
    t.model.head = Cosine(t.model.head.in_features, classifier.CLASSES, bias=False)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        certain = logits.softmax(1).gather(1, batch[1][:, None])[:, 0]
        loss = (1 - certain) ** 0.5 * F.cross_entropy(logits, batch[1], reduction="none")
        return {"loss": loss.mean(), "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "nonfinite-buffer", "nonfinite-input", "input-nonfinite", "nonfinite-activation", modules=("block1", "block2", "block3", ""), step=120, then=(*NONFINITE, "prediction-collapse", "output-constant", "step-skipped"))  # fmt: skip
def bad_batch_skipped(t: Training) -> None:
    """`if not loss.isfinite(): continue` after a batch with one Inf at step 120: weights are safe, the running statistics
    are not, and each validation from there on is NaN. TrainCheck: state that is not a parameter."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train" and step == 120:
            x = x.clone()
            x[7, 0, 4, 4] = math.inf
        return x, y

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        if tensors["loss"].isfinite():
            tensors["loss"].backward()
            finish_update(training, step, observer)
        return batch, tensors

    t.sample, t.update = sample, update


@fault(classifier, "loss-input-mismatch", "weight-norm-drift", "activation-exploding", "gradient-exploding", "loss-sign", then=(*DIVERGES, *STUCK, "overfit", "dead-units", "feature-constant", "gradient-imbalance", "activation-saturated", "dtype-headroom", "precision-headroom"))  # fmt: skip
def likelihood_of_logits(t: Training) -> None:
    """`nll_loss` of logits, without the log softmax: it has no lower bound, and the weights grow for ever. Humbatova: wrong
    loss for the last layer; UMLAUT."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.nll_loss(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "input-range", "activation-exploding", "gradient-exploding", "gradient-imbalance", "update-ratio-high", "loss-diverged", "loss-spike", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "poor-initialisation", "activation-saturated", "gradient-zero", "parameter-unchanged", "module-unused", "class-imbalance"))  # fmt: skip
def pictures_of_255(t: Training) -> None:
    """Pictures of 0 to 255, everywhere, in a network without normalisation. UMLAUT: input not normalised; SageMaker
    CheckInputImages."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x * 42 + 127).clamp(0, 255).round(), y

    t.sample = sample
