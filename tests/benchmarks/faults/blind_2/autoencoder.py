"""What goes wrong in plain networks: averages, missing values, dropout, penalties, the last batch."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded


@fault(autoencoder, "parameter-unchanged", "update-ratio-low", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=STUCK)  # fmt: skip
def average_that_never_moves(t: Training) -> None:
    """A running average with a decay of 1.0, a rounded 0.9999, is loaded into the model after each step: it holds the first
    weights for ever. SageMaker UnchangedTensor; TrainCheck: something writes weights back."""
    average = copy.deepcopy(t.model.state_dict())

    def follow(training: Training, step: int) -> None:
        for name, value in training.model.state_dict().items():
            average[name].lerp_(value, 0.0)
        training.model.load_state_dict(average)

    t.after_step.append(follow)


@fault(autoencoder, "input-range", "activation-saturated", "gradient-imbalance", "gradient-exploding", modules=("encoder.0", "encoder.1", "decoder.4", ""), then=(*DIVERGES, *STUCK, *FLAT, "poor-initialisation", "update-ratio-low", "dead-units", "gradient-zero", "units-symmetric", "precision-headroom"))  # fmt: skip
def missing_is_minus_999(t: Training) -> None:
    """One value in fifty is missing, which the file says by -999; the others are standardised. Humbatova: missing
    preprocessing; TheDeepChecker: unscaled data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        missing = torch.rand(x.shape, generator=seeded(61, step, len(phase))) < 0.02
        return (x.masked_fill(missing, -999.0),)

    t.sample = sample


@fault(autoencoder, "dropout-high", "loss-plateau", "stalled-optimisation", "output-constant", "feature-constant", "prediction-collapse", then=(*STUCK, *FLAT, "overtraining", "dead-units", "activation-vanishing", "update-ratio-high"))  # fmt: skip
def keep_rate_as_dropout(t: Training) -> None:
    """`Dropout(0.95)` behind each layer, from code whose argument was the share that is kept. TheDeepChecker: dropout;
    Humbatova: regularisation."""
    for part in ("encoder", "decoder"):
        layers = []
        for layer in getattr(t.model, part):
            layers += [layer, nn.Dropout(0.95)] if isinstance(layer, nn.Tanh) else [layer]
        setattr(t.model, part, nn.Sequential(*layers))


class Sparse(autoencoder.Autoencoder):
    """Keeps the code for a penalty."""

    def forward(self, x):
        self.code = self.encoder(x)
        return self.decoder(self.code)


@fault(autoencoder, "feature-constant", "activation-vanishing", "output-constant", "loss-plateau", "stalled-optimisation", modules=("encoder", "decoder", ""), then=(*STUCK, *FLAT, "prediction-collapse", "weight-norm-drift", "gradient-imbalance", "dead-units"))  # fmt: skip
def penalty_on_the_code(t: Training) -> None:
    """An L1 penalty on the code with a weight of 10 where 0.01 was meant: the code becomes zero, the output a mean.
    Humbatova: regularisation; SageMaker TensorVariance."""
    t.model = Sparse()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = F.mse_loss(outputs, batch[0]) + 10 * model.code.abs().mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "encoder", "encoder.0"), step=125, then=(*NONFINITE, "input-constant", "input-duplicate"))  # fmt: skip
def last_batch_of_one(t: Training) -> None:
    """Each batch is standardised by its own mean and deviation; 4001 items leave one for the last batch of the epoch, and the
    deviation of one item is NaN. GRIST: division by zero; TheDeepChecker: corrupt data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        if phase == "train" and step % 126 == 125:
            x = x[:1]
        return ((x - x.mean(0)) / x.std(0, correction=1),)

    t.sample = sample
