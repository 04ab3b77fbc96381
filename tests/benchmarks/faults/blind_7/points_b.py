"""What goes wrong in networks of point clouds: pooling, the input transform, coordinates, initial weights, rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from faults import points
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training

LAYERS = ("transform", "local1", "local2", "deep1", "deep2", "classify", "segment1", "segment2")


def bare(channels: int) -> nn.Module:
    """No normalisation."""
    return nn.Identity()


# -- pooling and the transform ---------------------------------------------------------------------------------------


class Crowd(points.PointNet):
    def pooled(self, local):
        return self.deep2(self.deep1(local)).amax((0, 2)).expand(len(local), -1)


@fault(points, "feature-constant", "norm-input-variance", "output-constant", "prediction-collapse", "batch-leak", modules=("", "classify", "shape", "dropout"), then=(*STUCK, *FLAT, *DIVERGES, "dead-units", "gradient-zero", "parameter-unchanged", "class-imbalance", "overfit", "overtraining"))  # fmt: skip
def points_of_all_clouds_pooled(t: Training) -> None:
    """The maximum is taken over the points and over the batch: all clouds have one feature, and one class. Humbatova: wrong axis;
    UMLAUT: shapes."""
    t.model = Crowd()


class Untouched(points.PointNet):
    def forward(self, cloud):
        with torch.no_grad():
            matrix = self.transform(cloud)
        local = self.local2(self.local1(matrix @ cloud))
        whole = self.pooled(local)
        both = torch.cat([local, whole[:, :, None].expand(-1, -1, cloud.shape[2])], 1)
        return self.shape(self.dropout(self.classify(whole))), self.part(self.segment2(self.segment1(both))), matrix


@fault(points, "gradient-zero", "parameter-unchanged", "module-unused", modules=("transform",), then=("update-ratio-low",))  # fmt: skip
def transform_under_no_grad(t: Training) -> None:
    """The matrix was taken for preprocessing, and is computed under `no_grad`: nothing in front of it learns. TrainCheck: parameters
    without gradients; SageMaker UnchangedTensor."""
    t.model = Untouched()


class Second(points.PointNet):
    def __init__(self) -> None:
        super().__init__()
        self.features = points.TNet(32, nn.BatchNorm1d, nn.ReLU)


@fault(points, "module-unused", "parameter-unchanged", "gradient-zero", modules=("features",))
def feature_transform_never_called(t: Training) -> None:
    """The second transform, of the features, is built, and `forward` still goes from one layer to the next. TrainCheck: parameters
    not updated; Humbatova: missing layer."""
    t.model = Second()


@fault(points, "nonfinite-gradient", "nonfinite-parameter", modules=("", "transform", "transform.matrix"), then=(*NONFINITE, *STUCK))  # fmt: skip
def root_of_a_perfect_rotation(t: Training) -> None:
    """The transform begins as the identity, as in the paper, and the penalty takes the root of what it lacks to a rotation: zero.
    GRIST: slope of a root at zero."""
    nn.init.zeros_(t.model.transform.matrix.weight)
    nn.init.zeros_(t.model.transform.matrix.bias)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, found, matrix = model(batch[0])
        lacking = (matrix @ matrix.transpose(1, 2) - torch.eye(3)).square().sum((1, 2)).sqrt().mean()
        loss = F.cross_entropy(logits, batch[1]) + F.cross_entropy(found, batch[2]) + 0.01 * lacking
        return {"loss": loss, "logits": logits, "targets": batch[1], "points": found}

    t.forward = forward


@fault(points, "gradient-clipping", "gradient-imbalance", "gradient-exploding", "stalled-optimisation", "update-ratio-low", modules=("transform", ""), then=(*STUCK, *DIVERGES, *FLAT, "class-imbalance", "parameter-unchanged"))  # fmt: skip
def orthogonality_times_ten_thousand(t: Training) -> None:
    """The weight of the penalty is 1e4 for 1e-4; gradients are clipped to 1, and nearly all of that is the transform's. Humbatova:
    wrong loss; TrainCheck: clipping."""
    t.clip, t.optimize = 1.0, lambda p: torch.optim.SGD(p, 0.05)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, found, matrix = model(batch[0])
        loss = F.cross_entropy(logits, batch[1]) + F.cross_entropy(found, batch[2])
        return {
            "loss": loss + 1e4 * points.orthogonality(matrix),
            "logits": logits,
            "targets": batch[1],
            "points": found,
        }

    t.forward = forward


# -- coordinates -----------------------------------------------------------------------------------------------------


@fault(points, "input-range", "norm-input-variance", "gradient-exploding", "gradient-imbalance", "feature-constant", then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "gradient-clipping", "class-imbalance", "precision-loss", "dead-units", "update-ratio-low", "overfit", "overtraining"))  # fmt: skip
def coordinates_of_the_surveyor(t: Training) -> None:
    """Clouds stay in the coordinates of the map, easting and northing in metres, millions of them; nobody centres. UMLAUT: input
    not normalised; Humbatova: missing preprocessing."""
    plain, origin = t.sample, torch.tensor([398_200.0, 5_819_400.0, 35.0])[None, :, None]

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return x + origin, y, parts

    t.sample = sample


@fault(points, "activation-saturated", "input-range", modules=("local1", "transform", ""), then=(*STUCK, *FLAT, "gradient-imbalance", "gradient-zero", "update-ratio-low", "poor-initialisation", "class-imbalance", "overfit", "overtraining"))  # fmt: skip
def scans_in_millimetres(t: Training) -> None:
    """The scanner writes millimetres where the code has metres; tanh and no normalisation: all is -1 or 1. SageMaker
    SaturatedActivation and NotNormalizedData."""
    t.model, plain = points.PointNet(norm=bare, activation=nn.Tanh), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return 1000 * x, y, parts

    t.sample = sample


@fault(points, "input-nonfinite", "nonfinite-input", "nonfinite-activation", step=90, then=(*NONFINITE, *STUCK, "nonfinite-buffer"))  # fmt: skip
def radius_of_a_single_return(t: Training) -> None:
    """Clouds are divided by their radius; at step 90 one has a single return, repeated until there are enough points: 0 / 0. GRIST:
    division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        if phase == "train" and step >= 90:
            x[5] = 0.25
        return points.normalised(x), y, parts

    t.sample = sample


@fault(points, "input-drift", "input-range", step=29, then=(*STUCK, "overfit", "overtraining", "loss-diverged", "metric-constant", "activation-exploding"))  # fmt: skip
def validation_without_unit_sphere(t: Training) -> None:
    """The data set of the validation lacks the last transform: clouds there are in centimetres, and not centred. SageMaker
    NotNormalizedData; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return (60 * x + 80 if phase == "val" else x), y, parts

    t.sample = sample


@fault(points, "input-constant", "input-duplicate", "input-drift", step=80, then=(*STUCK, *FLAT, "loss-spike", "loss-diverged", "overfit", "overtraining"))  # fmt: skip
def depth_camera_returns_nothing(t: Training) -> None:
    """From step 80 on the depth camera of two rigs of three is unplugged: clouds of points that are all at the origin.
    TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        if phase == "train" and step >= 80:
            x[torch.arange(len(x)) % 3 > 0] = 0.0
        return x, y, parts

    t.sample = sample


@fault(points, "input-duplicate", then=("overfit", "overtraining"))
def clouds_of_six_readers(t: Training) -> None:
    """Six readers start with one seed, and each fills its part of the batch: four clouds, six times each. TrainCheck: workers with
    one seed."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            return plain(step, phase)
        x, y, parts = (value[:4] for value in plain(step, phase))
        return x.repeat(6, 1, 1), y.repeat(6), parts.repeat(6, 1)

    t.sample = sample


# -- initial weights -------------------------------------------------------------------------------------------------


@fault(points, "units-symmetric", "poor-initialisation", modules=(*LAYERS, "shape", "part", ""), then=(*STUCK, *FLAT, *DIVERGES, "norm-input-variance", "gradient-zero", "gradient-imbalance", "dead-units", "gradient-clipping", "class-imbalance", "parameter-unchanged"))  # fmt: skip
def ones_for_every_weight(t: Training) -> None:
    """`weights_init` was to reset norms to 1 and 0, but asks for whatever has a weight: all filters are alike. TheDeepChecker:
    symmetry; SageMaker PoorWeightInitialization."""
    for module in t.model.modules():
        if hasattr(module, "weight"):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


@fault(points, "dead-units", "gradient-zero", "feature-constant", "poor-initialisation", "output-constant", "prediction-collapse", modules=(*LAYERS, "shape", "part", ""), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "update-ratio-low", "class-imbalance", "gradient-imbalance"))  # fmt: skip
def uniform_below_zero(t: Training) -> None:
    """`uniform_(weight, -0.2, 0)`: the end of the range was left at zero; no weight is positive, and behind the first ReLU none opens.
    SageMaker DeadRelu; TheDeepChecker: initialisation."""
    t.model = points.PointNet(norm=bare)
    for module in t.model.modules():
        if isinstance(module, (nn.Conv1d, nn.Linear)):
            nn.init.uniform_(module.weight, -0.2, 0.0)


@fault(points, "gradient-vanishing", "feature-constant", "output-constant", modules=(*LAYERS, "shape", "part", ""), then=(*STUCK, *FLAT, "prediction-collapse", "gradient-imbalance", "update-ratio-low", "poor-initialisation", "units-symmetric", "class-imbalance"))  # fmt: skip
def sigmoids_before_the_pool(t: Training) -> None:
    """Sigmoids without normalisation, and six more layers of them before the pool: hardly a gradient comes to the first. AutoTrainer
    and SageMaker: vanishing gradients."""
    t.model = points.PointNet(norm=bare, activation=nn.Sigmoid)
    t.model.deep1 = nn.Sequential(*(points.shared(32, 32, bare, nn.Sigmoid) for _ in range(6)), t.model.deep1)


# -- rates -----------------------------------------------------------------------------------------------------------


@fault(points, "update-ratio-high", "loss-diverged", "loss-spike", "weight-norm-drift", step=40, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-zero", "gradient-vanishing", "overfit", "overtraining", "class-imbalance"))  # fmt: skip
def factor_of_decay_upside_down(t: Training) -> None:
    """`gamma` is one over the factor that was meant: every forty steps the rate is multiplied by ten, to 20. Humbatova: learning rate;
    AutoTrainer: oscillating loss; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: StepLR(optimizer, 40, 1 / 0.1)


@fault(points, "update-ratio-low", "scheduler-ends-early", "loss-plateau", "stalled-optimisation", step=20, then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def decay_of_epochs_at_each_batch(t: Training) -> None:
    """The decay that was meant for each twentieth epoch is applied at each batch: nothing moves after forty. Humbatova: learning
    rate; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: StepLR(optimizer, 1, 0.7)


@fault(points, "weight-norm-drift", "feature-constant", step=5, then=(*STUCK, *FLAT, "activation-vanishing", "update-ratio-low", "update-ratio-high", "weight-decay-on-norms", "norm-input-variance", "loss-diverged", "class-imbalance", "gradient-clipping", "dead-units", "gradient-zero", "output-constant"))  # fmt: skip
def points_decayed_to_nothing(t: Training) -> None:
    """`weight_decay=50` for AdamW, which multiplies it by the rate: a tenth of all weights goes at each step. Humbatova:
    regularisation; TheDeepChecker: underfitting."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=50.0)
