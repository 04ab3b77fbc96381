"""What goes wrong in CTC recognisers: hidden infinities, decoders, skipped steps, gates, transcripts, scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from faults import recogniser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from torch import nn

    from faults._training import Batch, Tensors, Training


@fault(recogniser, "gradient-zero", "gradient-vanishing", "loss-plateau", "stalled-optimisation", "parameter-unchanged", then=(*STUCK, "update-ratio-low", "module-unused", "weight-norm-drift", "metric-constant"))  # fmt: skip
def infinities_set_to_zero(t: Training) -> None:
    """A subsampling by 15 leaves three frames for four labels and more; `zero_infinity=True` makes a loss of zero, without a
    gradient. Speech: espnet/espnet and SpeechBrain, utterances shorter than their transcript."""
    t.model = recogniser.Recogniser(stride=15)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": recogniser.ctc(logits, batch, zero_infinity=True), "logits": logits}

    t.forward = forward


@fault(recogniser, "metric-constant", step=149)
def decoder_drops_another_blank(t: Training) -> None:
    """The loss has its blank at 0, the decoder drops the last symbol: no transcript is ever right, and the share of right
    ones is exactly 0. Speech: blank index of the decoder; Humbatova: wrong evaluation."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return plain({**tensors, "logits": tensors["logits"].roll(1, -1)}, batch)

    t.measure = measure


@fault(recogniser, "gradient-accumulation", "gradient-exploding", "loss-diverged", "update-ratio-high", step=1, then=(*DIVERGES, *STUCK, *FLAT, "gradient-clipping", "dead-units", "activation-saturated", "overfit"))  # fmt: skip
def zeroed_once_an_epoch(t: Training) -> None:
    """`zero_grad()` is a level too far out, in the loop over epochs of 100 steps. TrainCheck: missing `zero_grad`."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.05)), None

    def keep(training: Training, step: int) -> None:
        if step == 0:
            zero, calls = training.optimizer.zero_grad, []

            def now_and_then(set_to_none: bool = True) -> None:
                calls.append(1)
                if len(calls) % 100 == 1:
                    zero(set_to_none)

            training.optimizer.zero_grad = now_and_then

    t.before.append(keep)


@fault(recogniser, "step-skipped", "nonfinite-gradient", "parameter-unchanged", modules=("", "conv"), then=(*NONFINITE, *STUCK, "update-ratio-low", "metric-constant"))  # fmt: skip
def scaler_skips_everything(t: Training) -> None:
    """Distances of all utterances to one another, for a term that spreads them: the square root has an infinite slope where
    each is compared with itself, and the gradient scaler skips every step without a word. GRIST: square root of zero;
    TrainCheck: mixed precision."""
    t.scaled = True

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        means = model.conv(batch[0].transpose(1, 2)).mean(-1)
        distances = (means[:, None] - means).square().sum(-1).sqrt()
        return {"loss": recogniser.ctc(logits, batch) + 0.01 * (-distances).exp().mean(), "logits": logits}

    t.forward = forward


@fault(recogniser, "activation-vanishing", "feature-constant", "poor-initialisation", "gradient-vanishing", "activation-saturated", modules=("gru",), then=(*STUCK, "gradient-imbalance", "gradient-zero", "update-ratio-low", "metric-constant", "dead-units"))  # fmt: skip
def gate_never_opens(t: Training) -> None:
    """A bias of 14 at the update gate, by a recipe for LSTMs, whose forget gate has the opposite meaning: the state stays
    what it was, zero. SageMaker PoorWeightInitialization; TheDeepChecker."""
    with torch.no_grad():
        for name, parameter in t.model.gru.named_parameters():
            if name.startswith("bias_ih"):
                parameter[24:48] = 14.0


@fault(recogniser, "prediction-collapse", "output-constant", "feature-constant", "overfit", step=100, then=(*STUCK, *FLAT, "loss-spike", "gradient-exploding", "update-ratio-high", "gradient-zero", "update-ratio-low", "overtraining", "class-imbalance", "metric-constant"))  # fmt: skip
def transcripts_empty(t: Training) -> None:
    """From step 100 on the tokeniser knows none of the words: empty transcripts, and the model writes blanks only. Humbatova:
    wrong labels; speech: text normalisation."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, labels, lengths = plain(step, phase)
        return x, labels, (torch.zeros_like(lengths) if phase == "train" and step >= 100 else lengths)

    t.sample = sample


@fault(recogniser, "nonfinite-activation", "dtype-headroom", "input-range", "activation-exploding", modules=("conv", "activation", "norm", ""), then=(*NONFINITE, *STUCK, "step-skipped", "gradient-imbalance", "metric-constant"))  # fmt: skip
def integers_in_half_precision(t: Training) -> None:
    """Features of 16-bit audio that was never divided by 32768, in float16: the convolution overflows. Speech: scale of
    samples; GRIST: overflow."""
    t.precision, t.scaled, t.steps = torch.float16, True, 150
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        return (x * 32768).round(), *rest

    t.sample = sample
