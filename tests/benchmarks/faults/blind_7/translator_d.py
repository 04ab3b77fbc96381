"""What goes wrong in translators: schedules, decay, precision, heads, copies of models, momentum, losses and metrics of the wrong kind."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from faults import translator
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update
from faults.translator import WIDTH

PARTS = tuple(f"{part}.{i}" for part in ("encoder", "decoder") for i in range(2))
SELF = tuple(f"{part}.attention" for part in PARTS)


@fault(translator, "nonfinite-optimizer", "nonfinite-parameter", then=(*NONFINITE, "class-imbalance", "nonfinite-input", "metric-constant"))  # fmt: skip
def translator_warms_up_from_zero(t: Training) -> None:
    """The schedule of Vaswani et al. counts from zero: the root of its first step is infinite, its ramp is zero, and the rate their
    product, NaN. GRIST: division by zero; Humbatova: learning rate."""

    def factor(step: int) -> float:
        now = torch.tensor(float(step))
        return float((40 / now).sqrt() * (now / 40).clamp(max=1.0))

    t.schedule = lambda optimizer: LambdaLR(optimizer, factor)


@fault(translator, "weight-norm-drift", "activation-vanishing", "feature-constant", then=(*STUCK, *FLAT, "update-ratio-high", "dead-units", "weight-decay-on-norms", "class-imbalance", "gradient-zero", "attention-head-dead", "units-symmetric", "overtraining", "gradient-imbalance", "loss-diverged", "loss-spike"))  # fmt: skip
def translator_decays_to_nothing(t: Training) -> None:
    """`weight_decay=10`, where the exponent of `1e-2` was taken for its sign: each step takes weights down by up to 5 %. Humbatova:
    regularisation; TheDeepChecker: parameters."""
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, betas=(0.9, 0.98), weight_decay=10.0)


@fault(translator, "parameter-unchanged", "precision-loss", modules=("encoder_norm", "decoder_norm", "encoder", "decoder", ""), then=(*STUCK, "update-ratio-low", "class-imbalance"))  # fmt: skip
def translator_kept_in_bfloat16(t: Training) -> None:
    """Weights themselves are bfloat16, for memory, at the small rate of a fine-tuning: gains of norms, which are 1, take steps of less than
    their last digit. TrainCheck: dtype; Zamirai et al. 2020."""
    t.model = t.model.to(torch.bfloat16)
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-4, betas=(0.9, 0.98), weight_decay=0.01)


@fault(translator, "attention-head-dead", "dead-units", "feature-constant", modules=(*SELF, *(f"{name}.{part}" for name in SELF for part in ("value", "out"))), then=("gradient-zero", "units-symmetric", "poor-initialisation", "parameter-unchanged", "module-unused"))  # fmt: skip
def heads_of_translator_added_as_zeros(t: Training) -> None:
    """Two of four heads are added to those of a smaller file as zeros, in the values and in the projection behind them: neither ever gets a
    gradient. SageMaker AllZero; TheDeepChecker: zero weights."""
    with torch.no_grad():
        for block in (*t.model.encoder, *t.model.decoder):
            block.attention.value.weight[WIDTH // 2 :] = 0
            block.attention.value.bias[WIDTH // 2 :] = 0
            block.attention.out.weight[:, WIDTH // 2 :] = 0


@fault(translator, "metric-phase-mismatch", step=49, then=("overtraining", "metric-aggregate"))
def translator_validates_the_last_batch(t: Training) -> None:
    """The variable `loss` of the training loop is still there in the validation, and is logged as that of the validation. Humbatova: wrong
    validation metric; speech: losses that are not computed in validation."""
    last: list[float] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last[:] = [float(tensors["loss"].detach())]
        observer.log({"loss": last[0]}, "train", step)
        return batch, tensors

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": last[0], **training.measure(tensors, batch)}, "val", step)

    t.update, t.validate = update, validate


@fault(translator, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-clipping", "class-imbalance", "module-unused"))  # fmt: skip
def optimizer_of_the_first_translator(t: Training) -> None:
    """The model is copied, for an average of its weights, and the optimizer is given the one of both that is not trained. TrainCheck:
    parameters that are not updated; huggingface/accelerate#2665."""
    t.optimizers = [t.optimize(copy.deepcopy(t.model).parameters())]


@fault(translator, "update-ratio-high", "loss-diverged", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-clipping", "activation-saturated", "dead-units", "class-imbalance", "gradient-zero", "attention-head-dead"))  # fmt: skip
def momentum_of_translator_is_one(t: Training) -> None:
    """`momentum=1.0` for SGD: old gradients are never forgotten. Humbatova: optimiser settings; AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.5, momentum=1.0)


@fault(translator, "activation-saturated", "poor-initialisation", modules=(*SELF, *(f"{name}.{part}" for name in SELF for part in ("softmax", "query", "key"))), then=("gradient-vanishing", "gradient-imbalance", "gradient-exploding", "gradient-clipping", "activation-exploding", "gradient-zero", "loss-plateau", "stalled-optimisation", "update-ratio-low", "attention-head-dead"))  # fmt: skip
def queries_of_translator_far_too_large(t: Training) -> None:
    """Queries and keys of the self-attention are drawn with a gain of 30, the number of a seed: each head looks at one word only. SageMaker
    PoorWeightInitialization and SaturatedActivation."""
    for block in (*t.model.encoder, *t.model.decoder):
        for layer in (block.attention.query, block.attention.key):
            nn.init.xavier_uniform_(layer.weight, gain=30.0)


@fault(translator, "metric-type", step=49, then=("metric-range", "metric-phase-mismatch"))
def exact_of_each_sentence_in_a_list(t: Training) -> None:
    """`exact` is a list with one entry for each sentence, as the mean over them was left to a logger that takes none. Humbatova: wrong
    validation metric; speech: metrics that are no number."""
    measured = t.measure

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = (tensors["logits"].argmax(-1) == batch[2]) | (batch[2] == translator.NOTHING)
        return {**measured(tensors, batch), "exact": right.all(1).tolist()}

    t.measure = scores


@fault(translator, "gradient-zero", "parameter-unchanged", modules=("", "source", "target", "encoder", "encoder_norm", "decoder", "decoder_norm", "head"), then=(*STUCK, "update-ratio-low", "module-unused", "optimizer-owns-others", "gradient-vanishing", "class-imbalance"))  # fmt: skip
def loss_of_translator_made_anew(t: Training) -> None:
    """The loss is summed up in Python, and made a tensor again, with `requires_grad=True` to stop the error: nothing behind it has a
    gradient. TrainCheck: no gradients; Humbatova: wrong tensor."""
    plain = t.forward

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = plain(model, batch)
        return {**tensors, "loss": torch.tensor(float(tensors["loss"]), requires_grad=True)}

    t.forward, t.optimize = forward, lambda p: torch.optim.Adam(p, 5e-3, betas=(0.9, 0.98))


class Logarithmic(translator.Attention):
    """Scores in the logarithmic domain, by hand."""

    def forward(self, x, memory, hidden):
        q, k, v = (part.unflatten(-1, (translator.HEADS, -1)).transpose(1, 2) for part in (self.query(x), self.key(memory), self.value(memory)))  # fmt: skip
        weights = self.softmax((q @ k.mT / math.sqrt(WIDTH // translator.HEADS)).masked_fill(hidden, -math.inf))
        sharp = (1.5 * weights.log()).exp()
        return self.out((sharp / sharp.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


CROSS = tuple(f"decoder.{i}.cross{part}" for i in range(2) for part in ("", ".softmax", ".query", ".key", ".out"))


@fault(translator, "nonfinite-gradient", "nonfinite-parameter", modules=(*CROSS, "decoder.0", "decoder.1", "decoder"), then=(*NONFINITE, "class-imbalance", "metric-constant"))  # fmt: skip
def looks_of_translator_sharpened(t: Training) -> None:
    """Weights of the attention to the source are sharpened by a power, as the exponential of 1.5 times their logarithm: fine forwards, and
    zero times infinity backwards where padding is masked. GRIST: log of zero."""
    for block in t.model.decoder:
        sharper = Logarithmic()
        sharper.load_state_dict(block.cross.state_dict())
        block.cross = sharper


@fault(translator, "norm-input-variance", "activation-vanishing", modules=("encoder_norm", "decoder_norm", *(f"{part}.norm{i}" for part in PARTS for i in (1, 2, 3) if i != 2 or part.startswith("decoder"))), then=(*STUCK, *FLAT, "gradient-imbalance", "class-imbalance", "update-ratio-low"))  # fmt: skip
def norms_of_translator_with_an_epsilon_of_its_sign(t: Training) -> None:
    """`LayerNorm(eps=1e5)`, where 1e-5 was meant: all variances are far below it, and what is normalised is nearly zero. Humbatova: wrong
    layer argument; TheDeepChecker."""
    t.model = translator.Translator(norm=lambda width: nn.LayerNorm(width, eps=1e5))


@fault(translator, "gradient-zero", "parameter-unchanged", modules=("", "source", "target", "encoder", "encoder_norm", "decoder", "decoder_norm", "head"), then=(*STUCK, "update-ratio-low", "optimizer-owns-others", "module-unused", "gradient-vanishing", "class-imbalance"))  # fmt: skip
def translator_zeroed_before_its_step(t: Training) -> None:
    """`zero_grad()` was moved behind `backward()`, in front of clipping and step: nothing is left to step with. TrainCheck: zero_grad is
    misplaced."""
    t.after_backward.append(lambda training, step: training.optimizer.zero_grad())


@fault(translator, "metric-always-none", "metric-type", step=49, then=("metric-missing", "metric-phase-mismatch"))  # fmt: skip
def bleu_of_translator_is_none(t: Training) -> None:
    """The package for BLEU is not there, its wrapper returns None, and the plot shows an empty curve. Humbatova: wrong validation metric;
    speech: optional metrics."""
    measured = t.measure
    t.measure = lambda tensors, batch: {**measured(tensors, batch), "bleu": None}


@fault(translator, "metric-vanished", "metric-missing", step=199, then=("metric-phase-mismatch",))
def exact_of_translator_ends(t: Training) -> None:
    """`exact` is slow and left out from step 150 on, although the best model is chosen by it. Humbatova: wrong validation metric."""
    plain, measured, now = t.validate, t.measure, [0]

    def validate(training: Training, step: int, observer: Observer) -> None:
        now[0] = step
        plain(training, step, observer)

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = measured(tensors, batch)
        return known if now[0] < 150 else {"accuracy": known["accuracy"]}

    t.validate, t.measure = validate, scores
