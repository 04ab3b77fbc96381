"""`training`: a lint of the set-up before the run starts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from stethoscope._record import Finding, Report
from stethoscope.audits._training_batch import of_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

EARLY = 0.95  # share of the run: a schedule that ends within the last twentieth is as planned

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # noqa: SLF001 - covers all BatchNorms


def training(
    optimizer: Optimizer | Sequence[Optimizer],
    model: nn.Module | None = None,
    scheduler: object = None,
    loss_sign: Literal["positive", "negative"] | None = None,
    trainer: object = None,
    batch: tuple[Tensor, Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | float | Tensor | None = None,
    planned_steps: int | None = None,
) -> Report:
    """Look for the mistakes in a training's set-up that no error message tells.

    Nothing is changed and no step is made. Waits for the device. Severity in brackets:

    - `optimizer-owns-others` (error): none of the model's trainable parameters is in an optimizer;
      `optimizer-misses-parameters` (warning): some are not; `optimizer-duplicate-parameters` (warning): some are twice;
      `optimizer-frozen-parameters` (info): some have a learning rate but `requires_grad=False`.
    - `weight-decay-on-norms` (info): decay pulls norms' weights and biases to zero.
    - `scheduler-negative-loss` (warning): `ReduceLROnPlateau(threshold_mode="rel")` on a loss that may be negative.
    - `scheduler-ends-early` (warning): the schedule is over before the run is.
    - `early-stopping-blind` (warning): Lightning's `EarlyStopping(strict=False)` never stops if its metric is missing.
    - `nan-loss-hidden` (info): `TrainingArguments.logging_nan_inf_filter` replaces a NaN loss in the log.
    - `batch-order` (error) and `references-alike` (warning): mixture and references exchanged, or alike.
    - `loss-sign` (error): the loss of perfect estimates is not the lowest.

    Args:
        optimizer: one or several.
        model: whose parameters should be in there; without it only the optimizer's own groups are checked.
        scheduler: one or several of `torch.optim.lr_scheduler`; a Lightning trainer brings its own.
        loss_sign: `"negative"` if the loss can fall below zero, as SI-SDR in dB does. None: taken from `loss`.
        trainer: a Lightning or Hugging Face trainer, read by attribute.
        batch: `(mixture, references)`, shapes (B, T) and (B, S, T), on any device.
        loss: a value seen, or the function `loss(estimates, references)` where a batch is given.
        planned_steps: how often the scheduler will be stepped; taken from a Lightning trainer where it is known.

    Returns:
        A report; `.ok` if there is neither a warning nor an error.

    Raises:
        TypeError: `optimizer` holds something that is no `torch.optim.Optimizer`.
        ValueError: an unknown `loss_sign`.

    Examples:
        >>> import torch
        >>> model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> training(torch.optim.SGD(other.parameters(), lr=0.1), model).findings[0].code
        'optimizer-owns-others'
    """
    if loss_sign not in {None, "positive", "negative"}:
        raise ValueError(f"loss_sign must be 'positive', 'negative' or None, not {loss_sign!r}.")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, not {type(each).__name__}.")
    findings, perfect = of_batch(batch, loss)
    if loss_sign is None:
        seen = perfect if perfect is not None else None if loss is None or callable(loss) else float(loss)
        loss_sign = None if seen is None else "negative" if seen < 0 else "positive"
    schedulers, steps = _schedulers(scheduler, trainer, planned_steps)
    findings += [
        *_owned(optimizers, model),
        *(_decayed(optimizers, model) if model is not None else ()),
        *(finding for each in schedulers for finding in _scheduler(each, loss_sign, steps)),
        *_trainer(trainer),
    ]
    return Report(title="training set-up", findings=tuple(findings))


def _owned(optimizers: Sequence[Optimizer], model: nn.Module | None) -> Iterator[Finding]:
    held = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
    owned = {id(parameter) for parameter in held}
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    if len(owned) < len(held):
        often = Counter(id(parameter) for parameter in held)
        twice = _list([names.get(key, "a parameter of no name") for key, count in often.items() if count > 1])
        yield Finding(
            "optimizer-duplicate-parameters",
            "warning",
            f"{len(held) - len(owned)} parameters are in the optimizers more than once: {twice}.",
            "Each of them is updated more than once per step; give every parameter to one group of one optimizer.",
        )
    if model is None:
        return
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in trainable if id(p) not in owned]
    if trainable and len(missing) == len(trainable):
        yield Finding(
            "optimizer-owns-others",
            "error",
            f"None of the {len(trainable)} trainable parameters of the model is in the optimizer, which holds {len(owned)} "
            "others.",
            "Build the optimizer last, from model.parameters() of the very object that is trained.",
            evidence={"trainable": len(trainable), "owned": len(owned)},
        )
    elif missing:
        yield Finding(
            "optimizer-misses-parameters",
            "warning",
            f"{len(missing)} of {len(trainable)} trainable parameters are in no optimizer: {_list(missing)}.",
            "Add them to a group, or set requires_grad=False if they are meant to stay as they are.",
            evidence={"missing": missing[:100]},
        )
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and id(p) in owned]
    if frozen:
        yield Finding(
            "optimizer-frozen-parameters",
            "info",
            f"{len(frozen)} parameters in the optimizer have requires_grad=False and will not move: {_list(frozen)}.",
            "Leave them out of the optimizer if that is meant; set requires_grad=True before the first step if not.",
            evidence={"frozen": frozen[:100]},
        )


def _decayed(optimizers: Sequence[Optimizer], model: nn.Module) -> Iterator[Finding]:
    groups = [group for each in optimizers for group in each.param_groups]
    decay = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"]}
    hit = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
        if (isinstance(module, NORMS) or name == "bias") and p.requires_grad and decay.get(id(p), 0) > 0
    ]
    if hit:
        yield Finding(
            "weight-decay-on-norms",
            "info",
            f"Weight decay acts on {len(hit)} weights of norms and biases: {_list(hit)}.",
            "Put them into a group with weight_decay=0, as most recipes do; their scale has no over-fitting to lose.",
            evidence={"parameters": hit[:100]},
        )


def _schedulers(scheduler: object, trainer: object, planned: int | None) -> tuple[list[Any], int | None]:
    given = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
    configs = getattr(trainer, "lr_scheduler_configs", None) or []
    given += [config.scheduler for config in configs]
    most = getattr(trainer, "max_steps", None)
    every_step = all(getattr(config, "interval", "step") == "step" for config in configs)
    if planned is None and isinstance(most, int) and most > 0 and every_step:
        planned = most
    return [each for each in given if each is not None], planned


def _scheduler(scheduler: object, loss_sign: str | None, planned: int | None) -> Iterator[Finding]:
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        if scheduler.threshold_mode == "rel" and loss_sign == "negative":
            yield Finding(
                "scheduler-negative-loss",
                "warning",
                f"{name}(mode={scheduler.mode!r}, threshold_mode='rel', threshold={scheduler.threshold:g}) multiplies the "
                "best loss by 1 -+ threshold; below zero that turns around: a constant or slightly worse loss counts as "
                "better, and the learning rate is never cut.",
                "Use threshold_mode='abs' with a threshold in units of the loss, for example 0.1 dB.",
                evidence={"mode": scheduler.mode, "threshold": scheduler.threshold},
            )
        return
    end, after = _end(scheduler, planned)
    if planned is not None and end is not None and end < EARLY * planned:
        yield Finding(
            "scheduler-ends-early",
            "warning",
            f"{name} is over after {end:,} of {planned:,} steps; after that {after}.",
            "Set its length to the number of times that scheduler.step() is called: optimizer steps, or epochs.",
            evidence={"end": end, "planned_steps": planned},
        )


def _end(scheduler: object, planned: int | None) -> tuple[int | None, str]:
    """After how many steps a schedule is over, and what comes then."""
    if isinstance(scheduler, OneCycleLR):
        return int(scheduler.total_steps), "its step() raises an error"
    if isinstance(scheduler, CosineAnnealingLR):
        return int(scheduler.T_max), "the learning rate rises again"
    if isinstance(scheduler, PolynomialLR):
        return int(scheduler.total_iters), "the learning rate is zero"
    if isinstance(scheduler, LambdaLR) and planned:
        asked = range(0, planned + 1, max(1, planned // 200))
        factors = [max(abs(float(f(step))) for f in scheduler.lr_lambdas) for step in asked]
        if factors[-1] == 0:
            alive = [step for step, factor in zip(asked, factors, strict=True) if factor > 0]
            return (alive[-1] + asked.step if alive else 0), "the learning rate is zero"
    return None, ""


def _trainer(trainer: object) -> Iterator[Finding]:
    for callback in getattr(trainer, "callbacks", None) or []:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if "EarlyStopping" in kinds and getattr(callback, "strict", True) is False:
            yield Finding(
                "early-stopping-blind",
                "warning",
                f"EarlyStopping(monitor={callback.monitor!r}, strict=False) says nothing if that metric is never logged, and "
                "then never stops.",
                "Use strict=True, or make sure that the metric is logged in every validation.",
                evidence={"monitor": callback.monitor},
            )
    if getattr(getattr(trainer, "args", None), "logging_nan_inf_filter", False):
        yield Finding(
            "nan-loss-hidden",
            "info",
            "TrainingArguments(logging_nan_inf_filter=True), the default, replaces NaN and Inf losses by the mean of the "
            "others before they are logged.",
            "Set logging_nan_inf_filter=False while you look for NaN; the log then shows them.",
        )


def _list(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
