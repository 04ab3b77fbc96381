"""What goes wrong in CTC recognisers: wrong axes, probabilities, schedules, wiring of parameters, augmentation, silence."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import LambdaLR

from faults import recogniser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded


def loss_of(t: Training, scores, **options) -> None:
    """Compute the CTC loss of what `scores` makes of the model's output."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        frames = torch.full((len(logits),), logits.shape[1])
        loss = F.ctc_loss(scores(logits).transpose(0, 1), batch[1], frames, batch[2], **options)
        return {"loss": loss, "logits": logits}

    t.forward = forward


def features(t: Training, change) -> None:
    """Pass features through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        return change(x, step, phase), *rest

    t.sample = sample


# -- losses ----------------------------------------------------------------------------------------------------------


@fault(recogniser, "loss-input-mismatch", "loss-plateau", "stalled-optimisation", then=(*DIVERGES, *STUCK, *FLAT))
def softmax_across_frames(t: Training) -> None:
    """`log_softmax(dim=1)` of (batch, frames, symbols): probabilities sum to one over frames, not over symbols. Humbatova: wrong
    axis; speech: every forum on CTC."""
    loss_of(t, lambda logits: logits.log_softmax(1))


@fault(recogniser, "loss-input-mismatch", "loss-plateau", "stalled-optimisation", then=(*DIVERGES, *STUCK, *FLAT))
def probabilities_for_logarithms(t: Training) -> None:
    """`softmax` where `ctc_loss` takes logarithms of it. Humbatova: wrong loss for the last layer."""
    loss_of(t, lambda logits: logits.softmax(-1))


@fault(recogniser, "loss-input-mismatch", "activation-saturated", "loss-plateau", "stalled-optimisation", modules=("head",), step=100, then=STUCK)  # fmt: skip
def scores_through_tanh(t: Training) -> None:
    """The head ends in a tanh: no score is more than two above another. Humbatova: wrong activation of the last layer."""
    t.model.head = nn.Sequential(t.model.head, nn.Tanh())


@fault(
    recogniser,
    "gradient-exploding",
    "update-ratio-high",
    "loss-diverged",
    "loss-spike",
    then=(*DIVERGES, *STUCK, *FLAT),
)
def losses_summed_up(t: Training) -> None:
    """`reduction="sum"` under SGD with a rate for the mean. TheDeepChecker: missing reduction."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.3)), None
    loss_of(t, lambda logits: logits.log_softmax(-1), reduction="sum")


@fault(
    recogniser,
    "loss-sign",
    "loss-diverged",
    then=("gradient-clipping", *DIVERGES, *STUCK, *NONFINITE, *FLAT, "activation-saturated"),
)
def optimizer_maximises(t: Training) -> None:
    """`AdamW(..., maximize=True)`, left from a script that climbs a reward. TheDeepChecker: wrong sign; Humbatova: optimiser."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, maximize=True)


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(recogniser, "update-ratio-low", "schedule-unfinished", "loss-plateau", "stalled-optimisation", then=STUCK)
def warm_up_for_a_week(t: Training) -> None:
    """A warm-up of 50 000 steps, from the recipe of a large corpus; the run has 300. Humbatova: learning rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50_000))


@fault(recogniser, "weight-norm-drift", "feature-constant", "activation-vanishing", "output-constant", "prediction-collapse", then=(*DIVERGES, "gradient-clipping", *STUCK, *FLAT))  # fmt: skip
def decay_of_thirty(t: Training) -> None:
    """`weight_decay=30`, as with losses that are divided by the number of items: each step takes 6 % off all weights. Humbatova:
    regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=30.0)


@fault(recogniser, "parameter-unchanged", "precision-loss", then=(*STUCK, "update-ratio-low", "stalled-optimisation"))
def steps_below_bfloat(t: Training) -> None:
    """`model.bfloat16()` for all weights, and a rate of 1e-4: most steps are below half of the last bit. TrainCheck: dtype."""
    t.model = t.model.bfloat16()
    features(t, lambda x, step, phase: x.bfloat16())
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-4)
    loss_of(t, lambda logits: logits.float().log_softmax(-1))


@fault(recogniser, "loss-spike", "update-ratio-high", step=50, then=(*DIVERGES, *STUCK))
def best_is_the_first(t: Training) -> None:
    """After each epoch of 50 steps the best checkpoint is loaded, by `mode="max"` of the loss: that of the untrained model.
    Humbatova: training process; TrainCheck: something writes weights back."""
    first = copy.deepcopy(t.model.state_dict())

    def load(training: Training, step: int) -> None:
        if step and step % 50 == 0:
            training.model.load_state_dict(first)

    t.before.append(load)


# -- who is trained --------------------------------------------------------------------------------------------------


@fault(recogniser, "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("conv", "head"), then=("update-ratio-low", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def weight_norm_too_late(t: Training) -> None:
    """`weight_norm` is put on after the optimizer was built: the weights that it has are gone, length and direction belong to no
    one. TrainCheck: huggingface/accelerate#2665."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.conv, t.model.head = weight_norm(t.model.conv), weight_norm(t.model.head)


@fault(recogniser, "optimizer-frozen-parameters", "parameter-unchanged", modules=("gru",), then=("update-ratio-low", "loss-plateau", "stalled-optimisation", "gradient-zero"))  # fmt: skip
def recurrence_stays_frozen(t: Training) -> None:
    """The recurrent layer is frozen by a leftover of a fine-tuning, though it starts at random. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.gru.requires_grad_(False)


class OneDirection(recogniser.Recogniser):
    def forward(self, x):
        x = self.activation(self.conv(x.transpose(1, 2))).transpose(1, 2)
        states = self.gru(self.norm(x))[0]
        forth, back = states[..., :24], states[..., :24]
        return self.head(torch.cat([forth, back], -1))


@fault(recogniser, "gradient-zero", modules=("gru",), then=("parameter-unchanged", "module-unused", "gradient-vanishing", "update-ratio-low", "weight-norm-drift"))  # fmt: skip
def one_direction_twice(t: Training) -> None:
    """Both halves of the recurrent output are cut at the same place: the backward direction gets no gradient. Humbatova: wrong
    slice; SageMaker UnchangedTensor."""
    t.model = OneDirection()


class ThroughNumpy(recogniser.Recogniser):
    def forward(self, x):
        x = self.activation(self.conv(x.transpose(1, 2))).transpose(1, 2)
        loudness = x.detach().numpy().clip(0, 20)
        return self.head(self.gru(self.norm(torch.from_numpy(loudness)))[0])


@fault(recogniser, "gradient-zero", "parameter-unchanged", "module-unused", modules=("conv", "activation"), then=("gradient-vanishing", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def limited_in_numpy(t: Training) -> None:
    """Features are limited by a numpy function on their way: the graph ends there. TrainCheck: a part without gradients."""
    t.model = ThroughNumpy()


@fault(recogniser, "model-in-eval", step=50, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def evaluated_ever_after(t: Training) -> None:
    """`model.train()` stands in front of the loop, `model.eval()` in the validation within: dropout ends with the first one.
    TrainCheck: wrong mode; Humbatova: training process."""
    t.model = recogniser.Recogniser(norm=lambda width: nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.3)))

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 50)
        return plain_update(training, step, observer)

    t.update = update


# -- layers ----------------------------------------------------------------------------------------------------------


@fault(recogniser, "gradient-vanishing", "feature-constant", "gradient-imbalance", "norm-input-variance", "loss-plateau", "stalled-optimisation", modules=("conv", "norm", ""), then=(*STUCK, *FLAT, "update-ratio-low", "poor-initialisation", "parameter-unchanged"))  # fmt: skip
def eight_sigmoids_in_front(t: Training) -> None:
    """A front end of eight convolutions with sigmoids, plain SGD. AutoTrainer: vanishing gradient; SageMaker VanishingGradient."""
    layers = [t.model.conv, nn.Sigmoid()]
    for _ in range(7):
        layers += [nn.Conv1d(32, 32, 3, padding=1), nn.Sigmoid()]
    t.model.conv, t.model.activation = nn.Sequential(*layers), nn.Identity()
    t.optimize = lambda p: torch.optim.SGD(p, 0.1)


class Reshaped(recogniser.Recogniser):
    def forward(self, x):
        x = x.reshape(len(x), x.shape[2], x.shape[1])
        x = self.activation(self.conv(x)).transpose(1, 2)
        return self.head(self.gru(self.norm(x))[0])


@fault(recogniser, "loss-plateau", "stalled-optimisation", "prediction-collapse", then=(*STUCK, "overfit"))
def reshaped_not_transposed(t: Training) -> None:
    """`reshape` to (batch, features, frames) in place of `transpose`: frames and features are mixed. Humbatova: wrong axis."""
    t.model = Reshaped()


# -- data ------------------------------------------------------------------------------------------------------------


@fault(recogniser, "input-duplicate", "audio-duplicate", then=("overfit", "overtraining"))
def four_workers_draw_alike(t: Training) -> None:
    """Four workers draw with one seed: each utterance is in the batch four times. TrainCheck: duplicated data over workers."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(torch.cat([part[:3]] * 4) for part in batch) if phase == "train" else batch

    t.sample = sample


@fault(recogniser, "input-constant", "input-drift", "input-duplicate", "feature-constant", "output-constant", then=(*STUCK, *FLAT, "audio-duplicate", "audio-silent", "gradient-zero", "parameter-unchanged", "dead-units", "metric-constant", "module-unused"))  # fmt: skip
def masked_by_percents(t: Training) -> None:
    """A mask over time has 30, in percent, where a share of all frames is meant: it covers whole utterances. TheDeepChecker:
    constant inputs; speech: SpecAugment of one's own."""

    def mask(x, step, phase):
        if phase == "val":
            return x
        x = x.clone()
        width = int(30 * x.shape[1])
        start = int(torch.randint(x.shape[1], (), generator=seeded(71, step)))
        x[:, max(0, start - width) : start + width] = 0.0
        return x

    features(t, mask)


@fault(recogniser, "input-constant", "input-drift", "metric-constant", "input-duplicate", step=49, then=("overfit", "overtraining", "output-constant", "audio-silent", "audio-duplicate", "prediction-collapse", "feature-constant"))  # fmt: skip
def validation_is_silence(t: Training) -> None:
    """The list of validation files has old paths, and the reader returns zeros for files that are missing. Humbatova: wrong
    data; speech: data preparation."""
    features(t, lambda x, step, phase: torch.zeros_like(x) if phase == "val" else x)


@fault(recogniser, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "conv"), step=110, then=(*NONFINITE, "audio-nonfinite", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def variance_of_silence(t: Training) -> None:
    """Each utterance is divided by its deviation, without an epsilon; at step 110 one recording is nothing but zeros. GRIST:
    division by zero; speech: CMVN."""

    def normalise(x, step, phase):
        if phase == "train" and step == 110:
            x = x.clone()
            x[7] = 0.0
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)

    features(t, normalise)


class Centred(nn.Module):
    """Subtracts a running mean of all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(recogniser.FEATURES))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.02)
        return x - self.mean


class WithMean(recogniser.Recogniser):
    def __init__(self) -> None:
        super().__init__()
        self.centre = Centred()

    def forward(self, x):
        return super().forward(self.centre(x))


@fault(recogniser, "input-nonfinite", "nonfinite-input", "nonfinite-buffer", "nonfinite-activation", modules=("", "centre"), step=130, then=(*NONFINITE, "audio-nonfinite", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def mean_remembers_infinity(t: Training) -> None:
    """A running mean of log energies; at step 130 a single file has digital silence, -inf, and the mean never gets rid of it.
    TrainCheck: buffers; GRIST: log of zero."""
    t.model = WithMean()

    def silence(x, step, phase):
        if phase == "train" and step == 130:
            x = x.clone()
            x[2, :3] = -torch.inf
        return x

    features(t, silence)


@fault(recogniser, "input-range", "dead-units", modules=("conv", "activation", ""), then=("gradient-imbalance", *STUCK, *FLAT, *DIVERGES, "units-symmetric", "gradient-clipping", "poor-initialisation", "gradient-vanishing", "update-ratio-low"))  # fmt: skip
def energy_in_its_own_unit(t: Training) -> None:
    """The tenth feature is the frame's energy as it came, some ten thousands, beside nine that are standardised. UMLAUT: input
    not normalised; speech: CMVN over the wrong columns."""
    features(t, lambda x, step, phase: torch.cat([x[..., :9], 2e4 + 5e3 * x[..., 9:]], -1))


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(recogniser, "metric-nonfinite", step=49)
def precision_of_nothing(t: Training) -> None:
    """The precision of symbols is 0 / 0 as long as nothing is written, and NaN is what is logged. Humbatova: wrong validation
    metric; GRIST: division by zero."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = plain(tensors, batch)
        total = torch.tensor(float(batch[2].sum()))
        written = torch.tensor(metrics["written"]) * total
        return {"exact": metrics["exact"], "precision": float(torch.minimum(written, total) / written)}

    t.measure = measure
