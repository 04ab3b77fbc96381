"""More of what goes wrong in captioners: two optimizers, pretrained parts, rates, modes, what is measured, copies and dead units."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

from faults import captioner
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

FITS = ("overfit", "overtraining")


# -- what is trained -------------------------------------------------------------------------------------------------


@fault(captioner, "gradient-accumulation", modules=("encoder",), step=1, then=(*DIVERGES, *FITS, "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def encoder_optimizer_never_zeroed(t: Training) -> None:
    """Encoder and decoder have an optimizer each, and `zero_grad()` is called on that of the decoder only. TrainCheck: missing
    `zero_grad`."""
    t.optimizers = [torch.optim.Adam(part.parameters(), 4e-3) for part in (t.model.decoder, t.model.encoder)]
    t.clip = None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        seen = plain_update(training, step, observer)
        training.optimizers[1].step()
        return seen

    t.update = update


@fault(captioner, "optimizer-misses-parameters", "parameter-unchanged", modules=("decoder.words",), then=("model-changed", "optimizer-owns-others", "gradient-accumulation", "update-ratio-low"))  # fmt: skip
def word_vectors_loaded_afterwards(t: Training) -> None:
    """Pretrained vectors of words replace the table when the optimizer has been built: nobody trains them. TrainCheck: parameters that no
    optimizer holds."""
    t.optimizers = [t.optimize(t.model.parameters())]
    vectors = torch.randn(captioner.WORDS, captioner.WORD, generator=seeded(711))
    t.model.decoder.words = nn.Embedding.from_pretrained(vectors, freeze=False, padding_idx=captioner.PAD)


@fault(captioner, "parameter-unchanged", "gradient-zero", "module-unused", modules=("encoder",), then=("update-ratio-low", "optimizer-frozen-parameters", "gradient-imbalance"))  # fmt: skip
def features_without_a_graph(t: Training) -> None:
    """The encoder runs under `no_grad`, as in the recipe with a pretrained one, but this one is to be trained and is in the optimizer.
    TrainCheck: a part without gradients; SageMaker UnchangedTensor."""
    t.model.encoder.forward = torch.no_grad()(t.model.encoder.forward)


@fault(captioner, "update-ratio-low", "scheduler-ends-early", "parameter-unchanged", "stalled-optimisation", step=20, then=(*STUCK, *FITS))  # fmt: skip
def captioner_decay_at_each_batch(t: Training) -> None:
    """`ExponentialLR(gamma=0.8)` of the recipe, for epochs, is stepped at each batch: a millionth after 62. Humbatova: learning rate;
    SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.8)


@fault(captioner, "update-ratio-high", "weight-norm-drift", "activation-saturated", then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "dead-units", "gradient-zero", "gradient-imbalance", "gradient-clipping", "overtraining"))  # fmt: skip
def captioner_rate_without_an_exponent(t: Training) -> None:
    """`lr: 0.4e-3` is read by a parser that stops at the "e": 0.4, for Adam. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 0.4)


@fault(
    captioner,
    "gradient-clipping",
    "update-ratio-low",
    then=(*STUCK, "stalled-optimisation", "loss-plateau", "parameter-unchanged"),
)
def captioner_clipped_to_the_rate(t: Training) -> None:
    """`clip_gradient(optimizer, lr)`: the bound of the norm is the rate of another optimizer, 4e-4; SGD. TrainCheck: wrong clip; Humbatova:
    wrong argument."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)), 4e-4


@fault(captioner, "weight-norm-drift", "activation-vanishing", then=("weight-decay-on-norms", *STUCK, *FLAT, "gradient-imbalance", "update-ratio-high", "loss-diverged", "gradient-zero", "parameter-unchanged", "dead-units"))  # fmt: skip
def captioner_decay_of_twenty(t: Training) -> None:
    """`weight_decay=20` for AdamW, a number that was found for a rate of 1e-5: each step takes 8 % of all weights. Humbatova:
    regularisation; SageMaker TensorVariance."""
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=20.0)


@fault(captioner, "dropout-high", modules=("decoder.dropout", "decoder"), then=(*STUCK, "loss-spike", "gradient-vanishing"))  # fmt: skip
def captioner_drops_what_it_keeps(t: Training) -> None:
    """`Dropout(0.97)` in front of the head, from code whose argument is the share that is kept. Humbatova: regularisation; TheDeepChecker:
    dropout."""
    t.model.decoder.dropout.p = 0.97


# -- units -----------------------------------------------------------------------------------------------------------


@fault(captioner, "dead-units", "feature-constant", "activation-vanishing", "gradient-zero", "poor-initialisation", "parameter-unchanged", modules=("encoder.norm2", "encoder.relu2", "encoder.conv2", "encoder.conv1", "encoder.norm1", "encoder"), then=(*STUCK, *FLAT, "module-unused", "update-ratio-low", "gradient-imbalance", "output-constant"))  # fmt: skip
def means_loaded_into_biases(t: Training) -> None:
    """A converter writes running means of another network, around -12, into the biases of a norm: no ReLU behind it ever opens. SageMaker
    DeadRelu; TheDeepChecker: dead units."""
    nn.init.normal_(t.model.encoder.norm2.bias, -12.0, 1.0)


@fault(captioner, "units-symmetric", "poor-initialisation", modules=("decoder.attention", "decoder.attention.regions", "decoder.attention.memory"), then=("feature-constant", "activation-saturated", "gradient-imbalance"))  # fmt: skip
def attention_filled_with_one_number(t: Training) -> None:
    """All matrices of the attention are filled with 0.05, from a listing that leaves out how they are drawn: its 64 units are one.
    TheDeepChecker: symmetric units; Humbatova: weights initialisation."""
    for parameter in t.model.decoder.attention.parameters():
        nn.init.constant_(parameter, 0.05 if parameter.ndim > 1 else 0.0)


# -- batches and evaluation ------------------------------------------------------------------------------------------


@fault(captioner, "input-duplicate", then=FITS)
def one_picture_for_each_of_its_captions(t: Training) -> None:
    """The list has a row for each of five captions, the same caption has been written into all, and nobody shuffles: a batch holds six
    pictures. TrainCheck: duplicated data; TheDeepChecker: duplicated inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return batch if phase == "val" else tuple(part[torch.arange(len(part)) // 5] for part in batch)

    t.sample = sample


@fault(captioner, "metric-constant", step=49)
def captioner_counts_the_start(t: Training) -> None:
    """Captions that the model writes still begin with their start, and are compared with targets that do not: none is ever right.
    Humbatova: wrong validation metric."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        written = F.pad(tensors["written"][:, :-1], (1, 0), value=captioner.START)
        return plain({**tensors, "written": written}, batch)

    t.measure = measure


@fault(captioner, "metric-nonfinite", step=49, then=("metric-range",))
def perplexity_of_a_batch(t: Training) -> None:
    """The perplexity is the exponential of the sum over all words of a batch, and not of their mean: infinite until the model is good.
    GRIST: overflow of exp; Humbatova: wrong validation metric."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        losses = F.cross_entropy(tensors["logits"].mT, batch[2], reduction="sum", ignore_index=captioner.NOTHING)
        return {**plain(tensors, batch), "perplexity": float(losses.exp())}

    t.measure = measure


@fault(captioner, "validation-in-train-mode", step=49, then=("batch-leak", "metric-aggregate", "input-drift"))
def captioner_validated_in_train_mode(t: Training) -> None:
    """`eval()` in front of the validation is a `train()`, copied from the loop above it. TrainCheck: wrong mode."""
    t.model.eval = t.model.train
