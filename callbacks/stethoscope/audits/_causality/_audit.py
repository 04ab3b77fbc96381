"""Measures how far a model looks ahead, and names the module that makes it do so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope._aside import aside
from stethoscope.audits._causality._examine import Examiner
from stethoscope.audits._causality._inputs import Inputs
from stethoscope.audits._causality._repeat import BudgetError, Runs, resolve
from stethoscope.audits._causality._report import CausalityReport, ModeVerdict, report
from stethoscope.audits._causality._setup import plan, repeats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope.audits._causality._setup import Plan

_LEAST = 8
_MODES = ("eval", "train")


def causality(
    model: Any,
    x: Any,
    *,
    time_axis: int = -1,
    out_time_axis: int | None = None,
    allowed: int = 0,
    modes: Sequence[str] = _MODES,
    forward: Any = None,
    output: Any = None,
    lengths: Tensor | None = None,
    sample_rate: float | None = None,
    budget: int | None = None,
) -> CausalityReport:
    """Measure how far a model looks ahead in time, and name the module that makes it do so.

    **What it decides:** inputs from some step on are changed by a finite amount; an output that stands for an earlier
    step and moves all the same is a leak. Output step `n` stands for input step `n * hop`; the hop is measured by
    running two lengths, so that an encoder with a window of 16 has a look-ahead of 15. See `docs/causality.md`.

    **Cost:** forward passes only, some 30 to 60 for the first mode (fewer where a leak reaches everything), and one backward pass.
    The model is left as it was: buffers, RNG, training flags, gradients, hooks.

    Args:
        model: a module, a bound method, or any function of tensors.
        x: input of real size with noise or real data in it, batch of two or more; a tuple for several positional
            inputs. Those that have the length and batch size of the first are changed together with it. Any device.
        time_axis: axis of `x` along which time runs. The batch is axis 0, or 1 where time is axis 0.
        out_time_axis: the same of the output; None finds it.
        allowed: declared look-ahead in input steps (an encoder's window - 1, a block).
        modes: `"eval"`, `"train"`. Functions without a module have one behaviour, which stands for both.
        forward: name of the method to call, or a callable taking `(*x)` or `(model, *x)`.
        output: which part of the output to judge: a key, an index, a tuple of those, or a callable. None: all of it.
        lengths: `(batch,)` valid steps per item, passed as the last argument; then padding is examined too.
        sample_rate: input steps per second, to report milliseconds.
        budget: largest number of forward passes, at least 8 per mode; what is left over buys more positions to look at.
            None: 12 positions.

    Returns:
        A report; `.ok` is whether the look-ahead is at most `allowed` and nothing leaks across the batch.

    Raises:
        ValueError: an input that cannot be judged: NaN, wrong axis, too short, an output without time, a model that
            gives two different answers to the same question.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU())
        >>> report = causality(net, torch.randn(2, 2, 50))
        >>> report.causal, report.lookahead, report.culprit
        (False, 1, '0')
    """
    modes = _checked(modes, allowed, budget, sample_rate)
    inputs = _inputs(x, time_axis, lengths)
    subject = resolve(model, forward, len(inputs.args) + (lengths is not None))
    runs = Runs(subject, budget)
    distinct = modes if subject.module is not None else modes[:1]
    try:
        # Under inference mode there are no gradients to ask, and torch does not count the writes into a tensor.
        with aside(), torch.inference_mode(mode=False), runs.guard():
            with runs.mode(distinct[0]):
                setup = plan(runs, inputs, out_time_axis, output)
            per_mode = _examined(runs, setup, distinct, allowed, budget)
    except BudgetError as error:
        raise ValueError(
            f"{error} Finding out how the output follows the input took most of it: give a larger budget."
        ) from error
    per_mode.update(dict.fromkeys(modes[len(distinct) :], per_mode[distinct[0]]))
    name = type(subject.module).__name__ if subject.module is not None else "function"
    return report(name, per_mode, distinct, setup.notes, setup.inputs.steps, sample_rate, runs.passes)


def _examined(
    runs: Runs, setup: Plan, modes: Sequence[str], allowed: int, budget: int | None
) -> dict[str, ModeVerdict]:
    per_mode: dict[str, ModeVerdict] = {}
    first: dict[str, Tensor] | None = None
    for turn, mode in enumerate(modes):
        if budget is not None:
            # What a mode leaves over is for the next ones.
            runs.limit = runs.passes + (budget - runs.passes) // (len(modes) - turn)
        before = runs.passes
        with runs.mode(mode):
            base = repeats(runs, setup, mode)
            # Equal outputs in two modes: most likely the same function, looked at again where it matters most.
            same = first is not None and all(torch.equal(base[slot], first[slot]) for slot in base)
            known = [v.position for v in per_mode.values() if v.position is not None] if same else []
            first = base
            verdict = Examiner(runs, setup, allowed, known, briefly=same).examine(base)
        per_mode[mode] = replace(verdict, passes=runs.passes - before)
    return per_mode


def _checked(modes: Sequence[str], allowed: int, budget: int | None, sample_rate: float | None) -> tuple[str, ...]:
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or set(modes) - set(_MODES):
        raise ValueError(f"`modes` must be some of {list(_MODES)}, got {list(modes)}.")
    if allowed < 0:
        raise ValueError(f"`allowed` must be zero or more input steps, got {allowed}.")
    if budget is not None and budget < _LEAST * len(modes):
        raise ValueError(
            f"`budget` must be at least {_LEAST} forward passes per mode, got {budget} for {len(modes)} modes."
        )
    if sample_rate is not None and sample_rate <= 0:
        raise ValueError(f"`sample_rate` must be positive, got {sample_rate}.")
    return modes


def _inputs(x: Any, time_axis: int, lengths: Tensor | None) -> Inputs:
    args = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if not args or not isinstance(args[0], Tensor):
        raise ValueError(f"`x` must be a tensor or a tuple that starts with one, got {type(x).__name__}.")
    first = args[0]
    if not -first.dim() <= time_axis < first.dim():
        raise ValueError(f"x has shape {tuple(first.shape)}: there is no axis {time_axis} for time_axis.")
    if first.size(time_axis) < 4:
        raise ValueError(
            f"x has shape {tuple(first.shape)}, {first.size(time_axis)} steps along axis {time_axis}: too few to tell past from future. "
            "Give at least 4, and more than the receptive field; or is time_axis another one?"
        )
    if not first.numel():
        raise ValueError(f"x has shape {tuple(first.shape)}: it holds nothing.")
    inputs = Inputs(args, time_axis, lengths)
    for i in inputs.timed:
        tensor = args[i]
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"Input {i} holds NaN or Inf: a change could not be told. Give finite numbers.")
        if not (tensor.is_floating_point() or tensor.is_complex()) and len(tensor.unique()) < 2:
            raise ValueError(
                f"Input {i} holds integers that are all alike: there is no other value to change to. Give varied ones."
            )
    if lengths is not None and (
        not isinstance(lengths, Tensor)
        or lengths.dim() != 1
        or (first.dim() > 1 and len(lengths) != first.size(1 if time_axis % first.dim() == 0 else 0))
        or int(lengths.min()) < 1
        or int(lengths.max()) > first.size(time_axis)
    ):
        raise ValueError(
            f"`lengths` must be a (batch,) tensor of steps from 1 to {first.size(time_axis)}, one for each item of x of shape {tuple(first.shape)}, got {lengths}."
        )
    return inputs
