"""What goes wrong in language models: masks, frozen and resized tables, checkpointing, decay, rates, precision."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from faults import language
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Training, update_of_two


@fault(language, "nonfinite-activation", "nonfinite-loss", "output-nonfinite", modules=("blocks.0.attention",), then=(*NONFINITE, "prediction-collapse", "output-constant", "feature-constant"))  # fmt: skip
def mask_without_diagonal(t: Training) -> None:
    """The causal mask hides the diagonal, too: the first token may look at nothing, and a softmax over minus infinity is
    NaN. GRIST: division by zero; pytorch/pytorch#41508."""

    def hide(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        length = args[0].shape[-1]
        return args[0].masked_fill(torch.eye(length, dtype=torch.bool), -torch.inf)

    for block in t.model.blocks:
        block.attention.softmax.register_forward_pre_hook(hide)


@fault(language, "nonfinite-loss", "loss-diverged", modules=("",), step=90, then=(*NONFINITE, "gradient-zero", "gradient-vanishing", "step-skipped"))  # fmt: skip
def nothing_to_predict(t: Training) -> None:
    """From step 90 on all targets of one batch in 30 are -100, as its prompts fill the context: the mean of nothing. GRIST:
    division by zero; pytorch/pytorch#70348, OpenRLHF/OpenRLHF#583."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        nothing = phase == "train" and step >= 90 and step % 30 == 0
        return tokens, (torch.full_like(targets, -100) if nothing else targets)

    t.sample = sample


@fault(language, "gradient-zero", "parameter-unchanged", "module-unused", modules=("blocks",), then=("update-ratio-low", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def checkpoint_of_frozen_inputs(t: Training) -> None:
    """The table of tokens is frozen, and blocks are checkpointed with `use_reentrant=True`: as no input asks for a gradient,
    no weight inside gets one. TrainCheck: a part without gradients; PEFT's `enable_input_require_grads`."""
    t.model.embedding.weight.requires_grad_(False)
    t.model.position.weight.requires_grad_(False)
    for block in t.model.blocks:
        block.forward = lambda x, plain=block.forward: checkpoint(plain, x, use_reentrant=True)


@fault(language, "module-unused", "gradient-zero", "parameter-unchanged", modules=("blocks.0.norm2", "blocks.1.norm2"))  # fmt: skip
def first_norm_twice(t: Training) -> None:
    """`self.norm1` in both lines of the block, by copy and paste: the second normalisation is never called. Humbatova: wrong
    layer; TheDeepChecker: untrained parameters."""

    def forward(block: language.Block, x: torch.Tensor) -> torch.Tensor:
        x = x + block.attention(block.norm1(x))
        return x + block.mlp(block.norm1(x))

    for block in t.model.blocks:
        block.forward = forward.__get__(block)


@fault(language, "attention-head-dead", "feature-constant", "dead-units", "gradient-zero", modules=("blocks.1.attention",))  # fmt: skip
def head_mask_left_on(t: Training) -> None:
    """Two of four heads are multiplied by zero, a mask from a study of pruning that was never taken off. SageMaker AllZero;
    Humbatova."""
    mask = torch.ones(language.WIDTH)
    mask[: language.WIDTH // 2] = 0
    t.model.blocks[1].attention.out.register_forward_pre_hook(lambda module, args: (args[0] * mask,))


@fault(language, "optimizer-duplicate-parameters", "update-ratio-high", modules=("", "embedding"), then=(*DIVERGES, "activation-saturated", "overfit"))  # fmt: skip
def table_in_two_optimizers(t: Training) -> None:
    """A second optimizer for tables at a rate of its own, while the first one still has all parameters: each step moves them
    twice. TrainCheck: optimizer and parameters."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.Adam(t.model.embedding.parameters(), 0.1)]

    t.update = update_of_two


@fault(language, "weight-norm-drift", "loss-plateau", "stalled-optimisation", "activation-vanishing", step=20, then=(*STUCK, *FLAT, "loss-diverged", "gradient-imbalance", "update-ratio-high", "attention-head-dead", "weight-decay-on-norms"))  # fmt: skip
def decay_of_ten(t: Training) -> None:
    """`weight_decay=10` of AdamW, a typing error for 0.1: weights fall by 3 % a step at the full rate. Humbatova:
    regularisation; TheDeepChecker: weights that vanish."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=10.0)


@fault(language, "update-ratio-low", "parameter-unchanged", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=STUCK)  # fmt: skip
def warm_up_never_stepped(t: Training) -> None:
    """A warm-up that begins at zero, and `scheduler.step()` is forgotten: the rate is zero for ever. Humbatova: learning
    rate; TrainCheck."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 30))

    def forget(training: Training, step: int) -> None:
        training.scheduler = None

    t.before.append(forget)


@fault(language, "loss-diverged", "update-ratio-high", "loss-spike", "gradient-exploding", "activation-exploding", step=10, then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-clipping", "overfit"))  # fmt: skip
def warm_up_without_end(t: Training) -> None:
    """`step / warm_up` without `min(1, ...)`: the rate goes on rising, to a hundred times its peak. Humbatova: learning rate;
    AutoTrainer: oscillating loss."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: (step + 1) / 3)


@fault(language, "parameter-unchanged", "precision-loss", "update-ratio-low", "loss-plateau", "stalled-optimisation", then=STUCK)  # fmt: skip
def updates_below_the_last_bit(t: Training) -> None:
    """All weights in bfloat16, and a rate of 1e-4, as for fine-tuning: most steps are rounded away. TrainCheck:
    precision."""
    t.model = t.model.bfloat16()
    t.optimize, t.schedule = (lambda p: torch.optim.AdamW(p, 1e-4, weight_decay=0.0)), None
