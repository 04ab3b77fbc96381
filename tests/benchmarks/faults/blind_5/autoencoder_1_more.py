"""More of what goes wrong in plain networks: thresholds, counts, equal halves, modes, correlations."""

from __future__ import annotations

import torch
from torch import nn

from faults import autoencoder
from faults._fault import FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded


@fault(autoencoder, "dead-units", "gradient-zero", "feature-constant", "output-constant", "activation-vanishing", modules=("", "encoder", "encoder.1", "encoder.3", "decoder", "decoder.1", "decoder.3"), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "update-ratio-low", "overtraining"))  # fmt: skip
def threshold_of_five(t: Training) -> None:
    """`Softshrink(5)` for a sparse code, a threshold for data in raw units: all units are zero, and so are gradients. SageMaker DeadRelu;
    Humbatova: wrong layer argument."""
    t.model = autoencoder.Autoencoder(activation=lambda: nn.Softshrink(5.0))


@fault(autoencoder, "metric-nonfinite", step=49, then=("input-drift",))
def correlation_of_a_constant_column(t: Training) -> None:
    """The mean correlation over columns, one of which is zero throughout validation: 0 / 0. GRIST: division by zero; Humbatova: wrong
    metrics."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x = plain(step, phase)[0]
        return (x.index_fill(1, torch.tensor([5]), 0.0) if phase == "val" else x,)

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        told, wanted = (part - part.mean(0) for part in (tensors["outputs"], batch[0]))
        each = (told * wanted).sum(0) / (told.square().sum(0) * wanted.square().sum(0)).sqrt()
        return {**autoencoder.measure(tensors, batch), "correlation": float(each.mean())}

    t.sample, t.measure = sample, measure


@fault(autoencoder, "input-duplicate", then=("overfit", "overtraining"))
def readers_with_the_same_state(t: Training) -> None:
    """Two processes read with copies of one random state: the second half of each batch equals the first. TrainCheck: data of
    workers."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x = plain(step, phase)[0]
        return (x[:16].repeat(2, 1) if phase == "train" else x,)

    t.sample = sample


@fault(
    autoencoder,
    "model-in-eval",
    step=40,
    then=("overfit", "overtraining", "watch-starved", "probe-read-nothing", "loss-spike"),
)
def codes_plotted_in_eval(t: Training) -> None:
    """At step 40 codes are plotted in eval mode, and nothing turns it back: norms use old statistics from there on. TrainCheck: wrong
    mode."""
    t.model = autoencoder.Autoencoder(norm=nn.BatchNorm1d)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 40)
        return plain_update(training, step, observer)

    t.update = update


@fault(autoencoder, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "encoder", "encoder.0"), step=0, then=(*NONFINITE, *STUCK))  # fmt: skip
def logarithm_of_zero_counts(t: Training) -> None:
    """Columns are counts and are given as their logarithms; some counts are zero. GRIST: logarithm of zero; Humbatova: wrong
    preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x = plain(step, phase)[0]
        return (torch.poisson((x / 2 + 1).exp(), seeded(15, step, len(phase))).log(),)

    t.sample = sample
