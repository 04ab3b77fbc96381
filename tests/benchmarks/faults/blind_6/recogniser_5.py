"""What goes wrong in CTC recognisers: recurrences, noise on weights, symmetric filters, groups, clipping, vocabularies."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from faults import recogniser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, plain_validation, seeded, update_of_two


def features(t: Training, change) -> None:
    """Pass features through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        return change(x, step, phase), *rest

    t.sample = sample


# -- network ---------------------------------------------------------------------------------------------------------


@fault(recogniser, "activation-exploding", "gradient-exploding", "poor-initialisation", modules=("gru", "head", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-clipping", "gradient-imbalance", "dead-units", "dtype-headroom"))  # fmt: skip
def rectified_recurrence(t: Training) -> None:
    """A plain recurrent layer of ReLUs in place of the GRU, its matrix begun at 1.8 times the identity: states grow with each frame.
    SageMaker ExplodingTensor; AutoTrainer: exploding gradient."""
    t.model.gru = nn.RNN(32, 24, nonlinearity="relu", bidirectional=True, batch_first=True)
    with torch.no_grad():
        for name, parameter in t.model.gru.named_parameters():
            if name.startswith("weight_hh"):
                parameter.copy_(1.8 * torch.eye(24))


@fault(recogniser, "dropout-high", modules=("norm",), then=("loss-plateau", "stalled-optimisation", "prediction-collapse", "metric-constant", "loss-spike", "output-constant"))  # fmt: skip
def ninety_seven_percent_dropped(t: Training) -> None:
    """Dropout in front of the recurrence, where 0.97 was the share to keep. Humbatova: wrong dropout."""
    t.model.norm = nn.Sequential(t.model.norm, nn.Dropout(0.97))


@fault(recogniser, "units-symmetric", "poor-initialisation", "norm-input-variance", "feature-constant", modules=("conv", "activation", "norm", "gru"), then=(*STUCK, *FLAT, "dead-units", "overtraining", "gradient-zero", "gradient-imbalance"))  # fmt: skip
def one_number_in_all_matrices(t: Training) -> None:
    """`apply` of a function that fills each matrix with 0.05 and each bias with 0: channels are copies, and their norm is left with
    nothing. TheDeepChecker: symmetry; SageMaker PoorWeightInitialization."""
    for name, parameter in t.model.named_parameters():
        if not name.startswith("norm"):
            nn.init.constant_(parameter, 0.05 if parameter.ndim > 1 else 0.0)


class Whispered(recogniser.Recogniser):
    """A second convolution for high bands, added to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Conv1d(recogniser.FEATURES, 32, 7, 2, padding=3)

    def forward(self, x):
        x = x.transpose(1, 2)
        both = [self.conv(x), self.high(x)]
        x = self.activation(both[0]).transpose(1, 2)
        return self.head(self.gru(self.norm(x))[0])


@fault(recogniser, "module-unused", "parameter-unchanged", "gradient-zero", modules=("high",))
def second_filter_bank_indexed_away(t: Training) -> None:
    """Two filter banks are computed, and `[0]` takes the first where their sum is meant. Humbatova: wrong variable; SageMaker
    UnchangedTensor."""
    t.model = Whispered()


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(recogniser, "weight-norm-drift", "update-ratio-high", "loss-diverged", then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def noise_on_weights_stays(t: Training) -> None:
    """Variational noise is added to the weights before each step, and never taken off again. Speech: recipes with variational noise;
    Humbatova: regularisation."""

    def disturb(training: Training, step: int) -> None:
        made = seeded(11, step)
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=made))

    t.before.append(disturb)


@fault(
    recogniser,
    "gradient-clipping",
    "update-ratio-low",
    "loss-plateau",
    "stalled-optimisation",
    then=(*STUCK, "metric-constant"),
)
def bound_for_each_frame(t: Training) -> None:
    """The bound of the norm is divided by the number of frames, as if the loss were a sum over them, and once more by the batch: 1e-4,
    with SGD. TrainCheck: wrong clip."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)), 1e-4


@fault(recogniser, "optimizer-duplicate-parameters", modules=("", "head"), then=("update-ratio-high", *DIVERGES))  # fmt: skip
def head_stepped_by_both(t: Training) -> None:
    """One optimizer for the acoustic part, one for the head; the first is given all parameters. TrainCheck: parameters in two
    optimizers."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.SGD(t.model.head.parameters(), 0.01)]
    t.update = update_of_two


@fault(recogniser, "update-ratio-high", "loss-spike", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def rate_read_in_percent(t: Training) -> None:
    """The configuration says 0.2, in percent, and AdamW takes it as it is. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.AdamW(p, 0.2)


@fault(recogniser, "scheduler-ends-early", then=("schedule-unfinished", "loss-spike"))
def cosine_of_one_epoch(t: Training) -> None:
    """`T_max=50`, the batches of one epoch, in a run of six: the rate falls to zero and rises, three times. Humbatova: learning
    rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 50)


@fault(
    recogniser,
    "parameter-unchanged",
    "update-ratio-low",
    modules=("head",),
    then=("loss-plateau", "stalled-optimisation"),
)
def rate_of_the_head_as_text_of_zero(t: Training) -> None:
    """A factor for the head's rate is read as a whole number, `int("0.5")` by way of a float: 0. TrainCheck: parameters not updated;
    Humbatova: learning rate."""
    head = list(t.model.head.parameters())
    rest = [p for name, p in t.model.named_parameters() if not name.startswith("head")]
    groups = [{"params": rest}, {"params": head, "lr": 2e-3 * int(float("0.5"))}]
    t.optimizers = [torch.optim.AdamW(groups, 2e-3)]


# -- data and evaluation ---------------------------------------------------------------------------------------------


@fault(recogniser, "metric-constant", "overfit", step=99, then=("overtraining", "loss-diverged", "metric-phase-mismatch"))  # fmt: skip
def vocabulary_sorted_anew(t: Training) -> None:
    """The vocabulary of the validation set is built from its own files, in another order: its loss climbs as the other falls.
    Humbatova: wrong labels; speech: data preparation."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, labels, lengths = plain(step, phase)
        return x, (labels % (recogniser.SYMBOLS - 1) + 1 if phase == "val" else labels), lengths

    t.sample = sample


@fault(recogniser, "input-drift", "audio-rate", "input-range", step=49, then=("overfit", "overtraining", "loss-diverged", "metric-constant"))  # fmt: skip
def gain_of_the_telephone(t: Training) -> None:
    """Validation recordings come from the telephone line: upper bands empty, and at another level. Speech: sample rates; Humbatova: wrong
    data."""

    def change(x, step, phase):
        if phase == "train":
            return x
        return torch.cat([0.2 * x[..., :5] - 3.0, torch.full_like(x[..., 5:], -6.0)], -1)

    features(t, change)


@fault(recogniser, "validation-in-train-mode", step=49, then=("metric-aggregate",))
def beam_search_forgets_eval(t: Training) -> None:
    """The function for decoding leaves out `eval()`: a third of what reaches the recurrence is dropped in validation. TrainCheck: wrong
    mode."""
    t.model = recogniser.Recogniser(norm=lambda width: nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.3)))

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval = lambda: training.model
        plain_validation(training, step, observer)
        del training.model.eval

    t.validate = validate


@fault(recogniser, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))
def rate_of_errors_behind_a_condition(t: Training) -> None:
    """The share of right transcripts is computed while `step < 100` only, a condition that was turned round. Humbatova: wrong
    validation metric; speech: metrics that are missing in validation."""
    plain, calls = t.measure, []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        calls.append(1)
        metrics = plain(tensors, batch)
        return metrics if len(calls) <= 4 else {"written": metrics["written"]}

    t.measure = measure


@fault(recogniser, "metric-grad", step=0, then=("metric-phase-mismatch",))
def history_of_losses_with_graphs(t: Training) -> None:
    """A moving average of the loss is kept as a tensor with its graph, which grows with each step. PyTorch FAQ; TrainCheck: memory."""
    average: list[torch.Tensor] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        average[:] = [0.9 * average[0] + 0.1 * tensors["loss"] if average else tensors["loss"]]
        observer.log({"smoothed_loss": average[0]}, "train", step)
        return batch, tensors

    t.update = update
