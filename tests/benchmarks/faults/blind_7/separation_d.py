"""What goes wrong when speakers are separated: scalers, depth, rounding, penalties, means over items, scales of layers, whole numbers."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from faults import separation
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded
from faults.separation import CHANNELS, Separator, measure, pit, shown

COLLAPSED = ("stalled-assignment", "output-collapse", "assignment-ambiguous", "stalled-from-start")
THREE = ("layers.0", "layers.1", "layers.2")


@fault(separation, "step-skipped", "nonfinite-gradient", "parameter-unchanged", modules=("", "decoder"), then=(*NONFINITE, *STUCK, *COLLAPSED, "update-ratio-low", "optimizer-owns-others"))  # fmt: skip
def separator_never_steps_for_its_scaler(t: Training) -> None:
    """A term for levels of short frames takes the root of their energies, and the last frame is masked: its slope is infinite, and the
    scaler skips each step without a word. GRIST: sqrt at zero; TrainCheck: scaler."""
    t.scaled = True

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        inside = torch.arange(separation.SAMPLES) < separation.SAMPLES - 64
        said, heard = ((x * inside).unflatten(-1, (-1, 64)).square().sum(-1).sqrt() for x in (estimates, batch[1]))
        return shown(pit(estimates, batch[1]) + 0.1 * (said - heard).abs().mean(), estimates, batch)

    t.forward = forward


class Plain(nn.Module):
    """A layer as of old, without a path around it."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=dilation, dilation=dilation)
        self.activation = nn.Sigmoid()

    def forward(self, x):
        return self.activation(self.conv(x))


@fault(separation, "gradient-vanishing", "feature-constant", "activation-vanishing", modules=("encoder", "layers", *(f"layers.{i}" for i in range(9)), "mask", ""), then=(*STUCK, *COLLAPSED, *FLAT, "gradient-imbalance", "gradient-zero", "update-ratio-low", "output-silent", "activation-saturated"))  # fmt: skip
def separator_of_nine_sigmoids(t: Training) -> None:
    """Nine layers with sigmoids, neither norms nor residual paths, as the refactoring lost both. TheDeepChecker and SageMaker: vanishing
    gradient; AutoTrainer."""
    t.model.layers = nn.Sequential(*(Plain(2 ** (i % 3)) for i in range(9)))


@fault(separation, "gradient-zero", "parameter-unchanged", modules=("", "encoder", "layers", "mask", "decoder"), then=(*STUCK, *COLLAPSED, "update-ratio-low", "module-unused", "optimizer-owns-others", "gradient-vanishing"))  # fmt: skip
def separator_rounds_to_sixteen_bits(t: Training) -> None:
    """Estimates are rounded as in the files that will be written, and the slope of `round` is zero everywhere. TrainCheck: no gradients;
    Humbatova: wrong operation."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = (model(batch[0]) * 4096).round() / 4096
        return shown(pit(estimates, batch[1]), estimates, batch)

    t.forward = forward


@fault(separation, "metric-phase-mismatch", "metric-constant", "metric-missing", step=49, then=("metric-always-none", "metric-unexpected"))  # fmt: skip
def separator_scores_by_default(t: Training) -> None:
    """`recall` of speakers is read by `.get("recall", 0.0)` from results that have never held it, in validation only. Speech: metrics that
    are missing; Humbatova: wrong validation metric."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        loss = float(tensors["loss"].detach())
        observer.log({"loss": loss, "si_sdr_db": -loss}, "train", step)
        return batch, tensors

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = measure(tensors, batch)
        return {**known, "recall": known.get("recall", 0.0)}

    t.update, t.measure = update, scores


@fault(separation, "gradient-imbalance", "gradient-clipping", "weight-norm-drift", modules=("encoder",), then=(*STUCK, *COLLAPSED, *FLAT, *DIVERGES, "update-ratio-low", "parameter-unchanged", "output-silent", "loss-at-80-db"))  # fmt: skip
def separator_penalised_without_a_weight(t: Training) -> None:
    """A penalty on the encoder's filters, whose weight of 1e-4 was read as 1e4: its gradient is all that clipping leaves. Humbatova:
    regularisation; TheDeepChecker: loss terms."""
    t.optimize = lambda p: torch.optim.SGD(p, 2e-3, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        return shown(pit(estimates, batch[1]) + 1e4 * model.encoder.weight.square().sum(), estimates, batch)

    t.forward = forward


class Mean(Separator):
    """A mean that should run over channels runs over items."""

    def forward(self, mixture):
        encoded = self.encoder(mixture[:, None])
        loud = encoded.abs().mean(0, keepdim=True).expand_as(encoded)
        masks = self.sigmoid(self.mask(self.layers(loud))).unflatten(1, (2, CHANNELS))
        return self.decoder((masks * encoded[:, None]).flatten(0, 1)).view(len(mixture), 2, -1)


@fault(separation, "feature-constant", "batch-leak", modules=("layers", *THREE, "mask", "sigmoid", ""), then=(*STUCK, *COLLAPSED))  # fmt: skip
def separator_masks_of_the_mean_item(t: Training) -> None:
    """Levels for the masks are a mean over axis 0, that of items, where axis 1 was meant: all mixtures get the same masks. Humbatova: wrong
    axis; TheDeepChecker."""
    t.model = Mean()


@fault(separation, "activation-saturated", "activation-exploding", modules=("layers", *THREE, "mask", "sigmoid", ""), then=(*STUCK, *COLLAPSED, *DIVERGES, "gradient-zero", "gradient-vanishing", "gradient-imbalance", "gradient-clipping", "output-silent", "dead-units", "poor-initialisation"))  # fmt: skip
def separator_layer_scale_of_a_hundred(t: Training) -> None:
    """What a layer adds is multiplied by 100, where 1e-2 was meant: masks are 0 or 1 from the start. SageMaker SaturatedActivation;
    TheDeepChecker: scale of activations."""
    for layer in t.model.layers:
        layer.out.register_forward_hook(lambda module, args, output: 100 * output)


@fault(separation, "update-ratio-low", "parameter-unchanged", "stalled-from-start", "schedule-unreachable", "schedule-unfinished", then=(*STUCK, *COLLAPSED, "optimizer-owns-others"))  # fmt: skip
def separator_warms_up_by_whole_numbers(t: Training) -> None:
    """The factor of the warm-up is `step // 1000`, zero in each step of the run. Humbatova: learning rate; SageMaker UnchangedTensor."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1, (step + 1) // 1000))


@fault(separation, "nonfinite-activation", modules=("layers", *THREE, "layers.0.activation", ""), then=(*NONFINITE, *COLLAPSED, "nonfinite-buffer", "gradient-zero"))  # fmt: skip
def separator_powers_of_negatives(t: Training) -> None:
    """The activation is compressed by `x ** 0.5`, which was made for magnitudes: NaN wherever a value is negative. GRIST: power of a
    negative number."""

    class Compressed(nn.Module):
        def forward(self, x):
            return x**0.5

    t.model.layers[0].activation = Compressed()


@fault(separation, "nonfinite-optimizer", "nonfinite-parameter", step=150, then=(*NONFINITE, "loss-at-80-db", "output-silent"))  # fmt: skip
def separator_decays_beyond_its_end(t: Training) -> None:
    """A rate that falls as a power of what is left of 150 steps, in a run of 300: from step 151 on it is a power of a negative number, NaN.
    GRIST: invalid power; Humbatova: learning rate."""
    left = lambda step: float((1 - torch.tensor(float(step)) / 150) ** 0.9)  # noqa: E731 - one line beside its use
    t.schedule = lambda optimizer: LambdaLR(optimizer, left)


@fault(separation, "input-constant", "audio-silent", "loss-at-80-db", "input-duplicate", "batch-order", "audio-mixture", then=(*STUCK, *COLLAPSED, *FLAT, "output-silent", "gradient-zero", "parameter-unchanged", "references-alike", "dead-units", "audio-duplicate"))  # fmt: skip
def separator_hears_an_empty_buffer(t: Training) -> None:
    """Mixtures are added up in a buffer that is never handed on; the model is given another one, all zeros. SageMaker AllZero;
    TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return torch.zeros_like(mixture), references

    t.sample = sample


@fault(separation, "audio-mixture", "batch-order", then=("audio-peak", "input-drift"))
def separator_gains_of_references_only(t: Training) -> None:
    """Gains are drawn for the references of training, -12 to 12 dB, and the mixture is that of before: it is not their sum. Speech:
    augmentation after mixing; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        gains = 10 ** (1.2 * torch.rand(len(references), 2, 1, generator=seeded(9, step)) - 0.6)
        return mixture, references * (gains if phase == "train" else 1.0)

    t.sample = sample


@fault(separation, "gradient-zero", "parameter-unchanged", "stalled-from-start", then=(*STUCK, *COLLAPSED, "update-ratio-low", "module-unused", "optimizer-owns-others", "gradient-vanishing", "metric-constant"))  # fmt: skip
def separator_loss_cut_at_ten(t: Training) -> None:
    """The loss is clamped to 10 dB against outliers; that of an untrained model is 25, and behind a clamp there is no gradient. Humbatova: wrong
    loss; TrainCheck: no gradients."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        return shown(pit(estimates, batch[1]).clamp(max=10.0), estimates, batch)

    t.forward = forward
