"""More that goes wrong in networks of point clouds: types, rare classes, two optimizers, half precision, norms, signs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import points
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded, update_of_two

LAYERS = ("transform", "local1", "local2", "deep1", "deep2", "classify", "segment1", "segment2")


def bare(channels: int) -> nn.Module:
    """No normalisation."""
    return nn.Identity()


@fault(points, "input-dtype")
def clouds_of_doubles(t: Training) -> None:
    """Clouds are loaded by NumPy, in float64, and go so to the model, which turns them back: twice the memory. TrainCheck: dtype."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return x.double(), y, parts

    t.sample = sample
    t.model.register_forward_pre_hook(lambda module, args: (args[0].float(),))


@fault(
    points,
    "class-imbalance",
    "prediction-collapse",
    step=5,
    then=(*STUCK, "overfit", "overtraining", "metric-constant", "input-drift"),
)
def spheres_of_a_broken_crawler(t: Training) -> None:
    """The crawler has found nearly nothing but spheres, 49 of 50, and training takes what there is; validation is balanced. SageMaker
    ClassImbalance."""
    made, plain = seeded(51), t.sample
    y = torch.where(torch.rand(1400, generator=made) < 0.98, 0, torch.randint(7, (1400,), generator=made))
    x, parts = points.solids(y, made)
    x = x * (0.7 + 0.6 * torch.rand(1400, 3, 1, generator=made))
    x = points.normalised(x + 0.04 * torch.randn(x.shape, generator=made))

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            return plain(step, phase)
        drawn = seeded(52, step)
        items, chosen = torch.randperm(1400, generator=drawn)[:24], torch.randperm(160, generator=drawn)[:56]
        return points.augmented(x[items][:, :, chosen], drawn), y[items], parts[items][:, chosen]

    t.sample = sample


@fault(points, "optimizer-duplicate-parameters", modules=("transform",), then=("update-ratio-high",))
def transform_in_two_optimizers(t: Training) -> None:
    """The transform has got an optimizer of its own, with a lower rate, and stays in that of all. TrainCheck: optimizers and their
    parameters."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.Adam(t.model.transform.parameters(), 5e-4)]
    t.update = update_of_two


@fault(points, "metric-range", step=29)
def iou_added_up_over_parts(t: Training) -> None:
    """The overlaps of the parts are added up and not divided by their number: up to 4. Humbatova: wrong metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        values = points.measure(tensors, batch)
        return {**values, "part_iou": values["part_iou"] * len(batch[2].unique())}

    t.measure = measure


@fault(points, "nonfinite-activation", "input-range", "dtype-headroom", "precision-headroom", modules=("transform", "transform.points", "transform.points.0", "transform.points.0.0", "local1", "local1.0", ""), then=(*NONFINITE, *STUCK, *DIVERGES, "step-skipped", "nonfinite-buffer", "parameter-unchanged", "gradient-exploding"))  # fmt: skip
def coordinates_in_half_precision(t: Training) -> None:
    """Coordinates are millimetres from the corner of the site, hundreds of metres away; float16 ends at 65504. GRIST: overflow; UMLAUT:
    input not normalised."""
    t.precision, t.scaled, t.steps, t.val_every, plain = torch.float16, True, 24, 12, t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return 1000 * (x + 300.0), y, parts

    t.sample = sample


@fault(points, "loss-input-mismatch", modules=("shape", ""), then=(*STUCK, *FLAT, "dead-units", "gradient-zero", "class-imbalance"))  # fmt: skip
def scores_of_shapes_rectified(t: Training) -> None:
    """A ReLU stands behind each layer, behind the last one as well: no score of a shape is negative. Humbatova: wrong activation of the
    last layer; UMLAUT."""
    t.model.shape = nn.Sequential(t.model.shape, nn.ReLU())


@fault(points, "feature-constant", "norm-input-variance", "output-constant", "prediction-collapse", modules=("", "classify", "shape", "dropout", "transform", "transform.cloud", "transform.matrix"), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "module-unused", "class-imbalance", "dead-units", "update-ratio-low"))  # fmt: skip
def each_channel_a_group(t: Training) -> None:
    """`GroupNorm(channels, channels)` for all layers: behind the pool a channel is one number, and is normalised to zero.
    TheDeepChecker: wrong normalisation; Humbatova: layer properties."""
    t.model = points.PointNet(norm=lambda channels: nn.GroupNorm(channels, channels))


@fault(points, "input-drift", step=29, then=(*STUCK, "input-range", "overfit", "overtraining", "loss-diverged"))
def jitter_of_two_metres(t: Training) -> None:
    """Points are jittered by 2 where 0.02 was meant, without a limit: no shape is left in training, while validation has them.
    Humbatova: wrong preprocessing; SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return (x + 2 * torch.randn(x.shape, generator=seeded(53, step)) if phase == "train" else x), y, parts

    t.sample = sample


@fault(points, "poor-initialisation", "activation-exploding", "gradient-exploding", modules=(*LAYERS, "", "part", "shape"), then=(*DIVERGES, *STUCK, *NONFINITE, "gradient-imbalance", "activation-saturated", "class-imbalance", "gradient-clipping", "update-ratio-low"))  # fmt: skip
def points_with_unit_weights(t: Training) -> None:
    """`normal_(weight)` in all layers, its deviation left at 1, and no normalisation: each layer multiplies by five. SageMaker
    PoorWeightInitialization; TheDeepChecker: exploding."""
    t.model = points.PointNet(norm=bare)
    for module in t.model.modules():
        if isinstance(module, (nn.Conv1d, nn.Linear)):
            nn.init.normal_(module.weight)


@fault(points, "gradient-clipping", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def points_clipped_to_the_decay(t: Training) -> None:
    """`max_norm` is handed the weight decay, 1e-4, by position; gradients have a norm of 8. TrainCheck: wrong clip; AutoTrainer: slow
    convergence."""
    t.clip, t.optimize = 1e-4, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


@fault(points, "loss-sign", step=5, then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "activation-saturated", "metric-constant", "class-imbalance"))  # fmt: skip
def loss_of_parts_subtracted(t: Training) -> None:
    """The likelihood of the parts is added as if it was a loss: parts are learnt to be wrong, and the loss has no lower bound.
    Humbatova: wrong loss; TheDeepChecker: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, found, matrix = model(batch[0])
        likelihood = found.log_softmax(1).gather(1, batch[2][:, None]).mean()
        loss = F.cross_entropy(logits, batch[1]) + likelihood + 0.01 * points.orthogonality(matrix)
        return {"loss": loss, "logits": logits, "targets": batch[1], "points": found}

    t.forward = forward
