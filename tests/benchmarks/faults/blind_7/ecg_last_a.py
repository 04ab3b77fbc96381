"""The last of what goes wrong in reading electrocardiograms: who is trained, cut graphs, slopes, spikes, types, graphs that are kept."""

from __future__ import annotations

import torch
from torch import nn

from faults import ecg
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, update_of_two


@fault(ecg, "model-changed", "optimizer-misses-parameters", "parameter-unchanged", modules=("head",), step=90, then=("optimizer-owns-others", "loss-spike", "loss-diverged", "gradient-exploding", "gradient-imbalance", "gradient-accumulation", "loss-plateau"))  # fmt: skip
def ecg_head_of_a_new_list(t: Training) -> None:
    """At step 90 the list of findings is sorted anew and the head is built again; the optimizer keeps the old one. TrainCheck: parameters
    not in the optimizer, huggingface/accelerate#2665."""

    def before(training: Training, step: int) -> None:
        if step == 90:
            training.model.head = nn.Linear(64, len(ecg.FINDINGS))

    t.before.append(before)


@fault(ecg, "optimizer-frozen-parameters", modules=("blocks", "stem", ""), then=("parameter-unchanged", "gradient-zero", "loss-plateau", "overtraining", "stalled-optimisation"))  # fmt: skip
def ecg_all_but_the_head_frozen(t: Training) -> None:
    """Everything but the head is frozen by the configuration of a fine-tuning, for a network with random weights; the optimizer has it all.
    TrainCheck: frozen parameters; SageMaker UnchangedTensor."""
    t.model.stem.requires_grad_(requires_grad=False)
    t.model.blocks.requires_grad_(requires_grad=False)
    t.optimizers = [torch.optim.Adam(t.model.parameters(), 2e-3)]


@fault(ecg, "optimizer-duplicate-parameters", modules=("stem", "blocks", ""), then=("update-ratio-high", "weight-norm-drift", "loss-spike"))  # fmt: skip
def ecg_blocks_in_two_optimizers(t: Training) -> None:
    """One optimizer for stem and blocks, and one for all parameters in place of those of the head; both step. TrainCheck: optimizers and
    their parameters."""
    body = [*t.model.stem.parameters(), *t.model.blocks.parameters()]
    t.optimizers = [torch.optim.Adam(t.model.parameters(), 2e-3), torch.optim.Adam(body, 2e-3)]
    t.update = update_of_two


@fault(ecg, "parameter-changed", modules=("stem",), step=1, then=("weight-norm-drift",))
def ecg_frozen_stem_is_disturbed(t: Training) -> None:
    """The stem is frozen, and a hook that adds noise to all weights for better minima writes it like the others. TrainCheck: frozen
    parameters that change."""
    t.model.stem.requires_grad_(requires_grad=False)

    def disturb(training: Training, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))

    t.after_step.append(disturb)


@fault(ecg, "gradient-zero", "parameter-unchanged", "module-unused", modules=("stem", "blocks.0"), then=("update-ratio-low", "gradient-vanishing"))  # fmt: skip
def ecg_cut_behind_the_first_block(t: Training) -> None:
    """What leaves the first block is detached, to draw it for the report, and the drawn one goes on. TrainCheck: cut graph; SageMaker
    UnchangedTensor."""
    t.model.blocks[0].register_forward_hook(lambda module, args, output: output.detach())


@fault(ecg, "gradient-vanishing", "feature-constant", "output-constant", modules=("", "stem", "blocks", "head"), then=(*STUCK, *FLAT, "gradient-imbalance", "update-ratio-low", "poor-initialisation"))  # fmt: skip
def ecg_sigmoids_in_every_block(t: Training) -> None:
    """`activation=nn.Sigmoid` and no norms: each layer multiplies the gradient by a quarter at most. AutoTrainer: vanishing gradient;
    SageMaker VanishingGradient."""
    t.model = ecg.Reader(norm=lambda channels: nn.Identity(), activation=nn.Sigmoid)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


@fault(ecg, "loss-spike", "input-range", "activation-exploding", "gradient-exploding", step=25, then=(*DIVERGES, *NONFINITE, *STUCK, "input-drift", "gradient-imbalance", "dtype-headroom"))  # fmt: skip
def ecg_defibrillated_records(t: Training) -> None:
    """Every 25th batch holds two records with the pulse of a defibrillator, some kilovolts, and nothing clips or drops them.
    TheDeepChecker: outliers in the data; Humbatova."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, told = plain(step, phase)
        if phase == "train" and step % 25 == 0 and step > 0:
            x[:2, :, 100:110] += 5e4
        return x, told

    t.sample = sample
    t.model = ecg.Reader(norm=lambda channels: nn.Identity())


@fault(ecg, "input-dtype")
def ecg_doubles_of_the_reader(t: Training) -> None:
    """The package that reads the files returns float64, and nobody turns it back before the model does. TrainCheck: mistakes of dtype."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, told = plain(step, phase)
        return x.double(), told

    t.sample = sample
    t.model.register_forward_pre_hook(lambda module, args: (args[0].float(),))


@fault(ecg, "metric-grad", then=("metric-type", "metric-phase-mismatch"))
def ecg_losses_that_keep_their_graphs(t: Training) -> None:
    """The mean of all losses so far is logged, as a tensor, and the list that it is made of holds every graph. PyTorch FAQ; TrainCheck:
    memory."""
    kept: list[torch.Tensor] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        kept.append(tensors["loss"])
        observer.log({"loss": torch.stack(kept[-50:]).mean()}, "train", step)
        return batch, tensors

    t.update = update
