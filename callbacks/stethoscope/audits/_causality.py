"""Measures how far a model looks ahead, and names the module that makes it do so."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stethoscope._record import Finding, Report
from stethoscope.audits._accuse import Culprit, accuse
from stethoscope.audits._inputs import Inputs
from stethoscope.audits._perturb import TOLERANCES, Moved, Scan, changes
from stethoscope.audits._repeat import BudgetError, Narrow, Runs, resolve
from stethoscope.audits._setup import Plan, plan, repeats

if TYPE_CHECKING:
    from collections.abc import Sequence

_POSITIONS = 16
_FEWER = 3
_LEAST = 24
_MODES = ("eval", "train")


@dataclass(frozen=True, kw_only=True)
class ModeVerdict:
    """What was found in one mode.

    Args:
        lookahead: largest look-ahead, in input steps.
        allowed: look-ahead that was declared.
        culprit: module that breaks causality, `""` for the root's own forward; None where none does or is known.
        batch_leak: whether an item of the batch changes the outputs of another.
        padding_leak: whether steps beyond `lengths` change outputs before; None where it was not examined.
        where: `"nowhere"`, `"everywhere"`, `"at the start"` or `"at some steps"`.
        position: input step whose change moves the output furthest ahead of it.
        moved_from: input step of that output.
        size: largest change of an earlier output, relative to the largest change that the perturbation causes.
        output_size: the same change, relative to the rms of the output.
        dtype: type in which it was decided.
        tolerance: relative change up to which an output counts as unmoved.
        examined: input steps that were perturbed.
        passes: forward passes spent.
        nan_leak: whether NaN from `position` on reaches earlier outputs; None where it was not tried.
        gradient_leak: whether gradients of earlier outputs reach inputs from `position` on; None where not tried.
        notes: what a reader should know about how it was decided.
        picture: rows of `(input step, output step moved or not)`, one input step changed at a time.
        blame: the culprit in detail.
    """

    lookahead: int = 0
    allowed: int = 0
    culprit: str | None = None
    batch_leak: bool = False
    padding_leak: bool | None = None
    where: str = "nowhere"
    position: int | None = None
    moved_from: int | None = None
    size: float = 0.0
    output_size: float = 0.0
    dtype: str = "float32"
    tolerance: float = 0.0
    examined: int = 0
    passes: int = 0
    nan_leak: bool | None = None
    gradient_leak: bool | None = None
    notes: tuple[str, ...] = ()
    picture: tuple[tuple[int, tuple[bool, ...]], ...] = ()
    blame: Culprit | None = None
    batch_blame: Culprit | None = None

    @property
    def causal(self) -> bool:
        """Whether there is no look-ahead at all."""
        return self.lookahead == 0

    @property
    def ok(self) -> bool:
        """Whether the look-ahead is allowed and nothing leaks across the batch or from padding."""
        return self.lookahead <= self.allowed and not self.batch_leak and not self.padding_leak


@dataclass(frozen=True, kw_only=True)
class CausalityReport(Report):
    """What `causality` found.

    Args:
        lookahead: largest look-ahead over all modes, in input steps.
        culprit: module that breaks causality, `""` for the root's own forward; None where none does or is known.
        batch_leak: whether an item of the batch changes the outputs of another.
        per_mode: verdict per mode.
        steps: input steps of `x`.
        sample_rate: input steps per second, None where not given.
        passes: forward passes spent.
    """

    lookahead: int = 0
    culprit: str | None = None
    batch_leak: bool = False
    per_mode: dict[str, ModeVerdict] = field(default_factory=dict[str, ModeVerdict])
    steps: int = 0
    sample_rate: float | None = None
    passes: int = 0

    @property
    def causal(self) -> bool:
        """Whether there is no look-ahead at all, in any mode."""
        return self.lookahead == 0

    @property
    def ok(self) -> bool:
        """Whether, in every mode, the look-ahead is allowed and nothing leaks across the batch or from padding."""
        return all(verdict.ok for verdict in self.per_mode.values())

    @property
    def lookahead_ms(self) -> float | None:
        """The look-ahead in milliseconds, where `sample_rate` was given."""
        return None if self.sample_rate is None else 1000 * self.lookahead / self.sample_rate

    def plot(self, mode: str | None = None, width: int = 60) -> str:
        """Draw which output steps move when one input step moves, as text.

        Args:
            mode: which mode; by default the one that looks ahead furthest.
            width: characters per row.

        Returns:
            One row per input step that was changed alone: `|` is that step, `#` an output that moves, `!` an output
            that moves although it comes earlier, `.` an output that stays.
        """
        chosen = mode or max(
            self.per_mode, key=lambda name: (self.per_mode[name].lookahead, len(self.per_mode[name].picture))
        )
        rows = self.per_mode[chosen].picture
        lines = []
        for step, moved in rows:
            here = min(width - 1, step * width // self.steps)
            cells = []
            for cell in range(width):
                low, high = (
                    cell * len(moved) // width,
                    max((cell + 1) * len(moved) // width, cell * len(moved) // width + 1),
                )
                on = any(moved[low:high])
                cells.append("." if not on else "!" if cell < here else "#")
            if cells[here] == ".":
                cells[here] = "|"
            lines.append(f"{step:>8} {''.join(cells)}")
        return "\n".join(lines)


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

    **Cost:** forward passes only, some 40 per mode (fewer where a leak reaches everything), and one backward pass.
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
        budget: largest number of forward passes, at least 24; None for no limit.

    Returns:
        A report; `.ok` is whether the look-ahead is at most `allowed` and nothing leaks across the batch.

    Raises:
        ValueError: an input that cannot be judged: NaN, wrong axis, too short, an output without time, a model that
            gives two different answers to the same question.

    Example:
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
    per_mode: dict[str, ModeVerdict] = {}
    with runs.guard():
        with runs.mode(distinct[0]):
            setup = plan(runs, inputs, out_time_axis, output)
        first: dict[str, Tensor] | None = None
        for turn, mode in enumerate(distinct):
            left = runs.left
            share = 0 if left == inf else int(left * (len(distinct) - turn - 1) / (len(distinct) - turn))
            before = runs.passes
            with runs.mode(mode):
                base = repeats(runs, setup, mode)
                # Equal outputs in two modes: most likely the same function, looked at again where it matters most.
                same = first is not None and all(torch.equal(base[slot], first[slot]) for slot in base)
                known = [v.position for v in per_mode.values() if v.position is not None] if same else []
                first = base
                verdict = _Examiner(runs, setup, allowed, share, known, briefly=same).examine(base)
            per_mode[mode] = replace(verdict, passes=runs.passes - before)
    for mode in modes[len(distinct) :]:
        per_mode[mode] = per_mode[distinct[0]]
    return _report(per_mode, distinct, setup, subject.module, sample_rate, runs)


class _Examiner:
    """Decides one mode."""

    def __init__(self, runs: Runs, setup: Plan, allowed: int, share: int, known: list[int], *, briefly: bool) -> None:
        self.runs = runs
        self.setup = setup
        self.allowed = allowed
        self.reserve = share
        self.known = known
        self.briefly = briefly

    def examine(self, base: dict[str, Tensor]) -> ModeVerdict:
        """Decide in the type given; where rounding could be mistaken for a leak, or hide one, again in float64."""
        dtype = next(iter(base.values())).dtype
        scan = self._scanned(
            self.setup, base, TOLERANCES.get(dtype, TOLERANCES.get(self.setup.inputs.first.dtype, 1e-5))
        )
        reach = max((moved.ahead for moved in scan.seen), default=-inf)
        exact = max((moved.exact for moved in scan.seen), default=-inf)
        if exact <= max(reach, self.allowed) or dtype in (torch.float64, torch.complex128):
            return self._verdict(scan, ())
        with self.runs.wide():
            wide = self.setup.wide()
            try:
                with Narrow() as narrow:
                    base64 = wide.outputs(self.runs)
            except (RuntimeError, TypeError, ValueError):
                base64 = {}
            if (
                base64
                and not narrow.seen
                and all(t.dtype in (torch.float64, torch.complex128) for t in base64.values())
            ):
                scan64 = self._scanned(wide, base64, TOLERANCES[torch.float64])
                return self._verdict(scan64, ("Changes near rounding were seen, so it was decided in float64.",))
        if max((moved.strong for moved in scan.seen), default=-inf) <= self.allowed:
            # Perturbations that change the level let norms blow up rounding: only noise of the input's own level is left.
            level = replace(self.setup, inputs=replace(self.setup.inputs, kinds=("unit",)))
            scan = self._scanned(level, base, scan.tolerance)
        note = f"Changes near rounding were seen; the model does not run in float64, so up to {scan.tolerance:.0e} of the largest change counts as rounding."
        return self._verdict(scan, (note,))

    def _scanned(self, setup: Plan, base: dict[str, Tensor], tolerance: float) -> Scan:
        scan = Scan(self.runs, setup.inputs, setup.tracks, base, tolerance, setup.pick)
        positions = scan.positions(_FEWER if self.briefly else _POSITIONS)
        scan.scan([*dict.fromkeys((*self.known, *positions))], 1 if self.briefly else 3, self.reserve + 12)
        scan.climb(self.reserve + 10)
        return scan

    def _verdict(self, scan: Scan, notes: tuple[str, ...]) -> ModeVerdict:
        best = scan.furthest()
        if best is None:
            raise ValueError(
                f"No perturbation of x along axis {scan.inputs.time_axis} moved any output: nothing can be said about time. "
                "Give an input that the output depends on."
            )
        lookahead = max(0, int(best.ahead))
        whole = lookahead > 0 and best.first == 0 and best.start >= 0.5 * scan.inputs.steps
        batch = self._batch_leak(scan)
        leaks = lookahead > self.allowed
        blame = batch_blame = None
        try:
            if leaks:
                blame = accuse(self.runs, scan, self.setup.other, best, self.allowed, whole=whole)
            if batch is not None:
                batch_blame = accuse(self.runs, scan, self.setup.other, batch, 0, whole=False, batch=True)
        except BudgetError:
            notes = (*notes, "The budget was spent before the culprit was found.")
        nan, gradient = (None, None) if self.briefly and not leaks else self._opinions(scan, best)
        return ModeVerdict(
            lookahead=lookahead,
            allowed=self.allowed,
            culprit=blame.module if blame is not None else None,
            batch_leak=batch is not None,
            padding_leak=self._padding_leak(scan),
            where=_where(scan, self.allowed),
            position=best.start if lookahead else None,
            moved_from=best.first if lookahead else None,
            size=best.size if lookahead else 0.0,
            output_size=best.output_size if lookahead else 0.0,
            dtype=str(next(iter(scan.base.values())).dtype).removeprefix("torch."),
            tolerance=scan.tolerance,
            examined=len({moved.start for moved in scan.seen}),
            nan_leak=nan,
            gradient_leak=gradient,
            notes=(*notes, *_disagreements(leaks, nan, gradient)),
            picture=() if self.briefly and not leaks else self._picture(scan),
            blame=blame,
            batch_blame=batch_blame,
        )

    def _batch_leak(self, scan: Scan) -> Moved | None:
        """Change one item everywhere and look at the others."""
        if scan.inputs.items < 2:
            return None
        for item, kind in ((0, 0), (scan.inputs.items - 1, 1)):
            if self.runs.left <= self.reserve:
                return None
            other = scan.outputs(scan.inputs.perturbed(0, kind, item=item))
            for track in scan.tracks:
                if track.batch is None or other[track.slot].shape != scan.base[track.slot].shape:
                    continue
                change = changes(scan.base[track.slot], other[track.slot], track)
                rest = torch.cat([change[:item], change[item + 1 :]])
                largest = float(change.max())
                if 0 < largest < inf and float(rest.max()) > scan.tolerance * largest:
                    return Moved(item, kind, size=float(rest.max()) / largest, slot=track.slot)
        return None

    def _padding_leak(self, scan: Scan) -> bool | None:
        """Change what lies beyond `lengths` and look at what lies before."""
        inputs = scan.inputs
        if inputs.lengths is None or inputs.batch_axis is None or self.runs.left <= self.reserve + 2:
            return None
        lengths = inputs.lengths
        if int(lengths.min()) >= inputs.steps:
            lengths = lengths.clone()
            lengths[-1] = max(1, 3 * inputs.steps // 4)
        inputs = replace(inputs, lengths=lengths)
        base, other = scan.outputs(inputs), scan.outputs(inputs.perturbed(0, 0, starts=lengths))
        for track in scan.tracks:
            if track.batch is None or base[track.slot].shape != other[track.slot].shape:
                continue
            change = changes(base[track.slot], other[track.slot], track)
            # What a window reaches beyond the end by right is not a leak.
            valid = [max(0, ceil((int(n) - self.allowed) / track.hop)) for n in lengths]
            early = max((float(row[:n].max()) for row, n in zip(change, valid, strict=True) if n), default=0.0)
            if early > scan.tolerance * max(float(change.max()), _size(base[track.slot])):
                return True
        return False

    def _opinions(self, scan: Scan, best: Moved) -> tuple[bool | None, bool | None]:
        """Ask NaN and gradients the same question, at the same place."""
        inputs = scan.inputs
        start = best.start if best.ahead > 0 else inputs.steps // 2
        return self._nan_opinion(scan, start), self._gradient_opinion(scan, start)

    def _nan_opinion(self, scan: Scan, start: int) -> bool | None:
        if (
            not (scan.inputs.first.is_floating_point() or scan.inputs.first.is_complex())
            or self.runs.left <= self.reserve
        ):
            return None
        try:
            other = scan.outputs(scan.inputs.poisoned(start))
        except Exception:  # noqa: BLE001  # models may refuse NaN in any way; then there is no opinion
            return None
        bad = False
        for track in scan.tracks:
            early = max(0, ceil((start - self.allowed) / track.hop))
            base = scan.base[track.slot].narrow(track.axis, 0, min(early, scan.base[track.slot].size(track.axis)))
            if other[track.slot].size(track.axis) < base.size(track.axis):
                return None
            new = other[track.slot].narrow(track.axis, 0, base.size(track.axis))
            bad |= bool((torch.isnan(new) & ~torch.isnan(base)).any())
        return bad

    def _gradient_opinion(self, scan: Scan, start: int) -> bool | None:
        if (
            not (scan.inputs.first.is_floating_point() or scan.inputs.first.is_complex())
            or self.runs.left <= self.reserve
        ):
            return None
        args = list(scan.inputs.call())
        sources = [args[i].requires_grad_() for i in scan.inputs.timed]
        # Models may write into what they are given, which a leaf that requires gradients forbids.
        for i, source in zip(scan.inputs.timed, sources, strict=True):
            args[i] = source * 1
        try:
            outputs = scan.take(self.runs(tuple(args), grad=True), detach=False)
            total: Tensor | float = 0.0
            for track in scan.tracks:
                early = min(max(0, ceil((start - self.allowed) / track.hop)), outputs[track.slot].size(track.axis))
                part = outputs[track.slot].narrow(track.axis, 0, early)
                part = torch.view_as_real(part) if part.is_complex() else part
                generator = torch.Generator().manual_seed(0)
                weights = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.device, part.dtype)
                total = total + (part * weights).sum()
            if not isinstance(total, Tensor) or not total.requires_grad:
                return None
            gradients = torch.autograd.grad(total, sources, allow_unused=True)
        except Exception:  # noqa: BLE001  # not differentiable, in whatever way; then there is no opinion
            return None
        for gradient in gradients:
            if gradient is None:
                continue
            size = gradient.abs()
            late = size.narrow(scan.inputs.time_axis, start, scan.inputs.steps - start)
            if float(late.max()) > scan.tolerance * float(size.max()):
                return True
        return False

    def _picture(self, scan: Scan) -> tuple[tuple[int, tuple[bool, ...]], ...]:
        """Change single steps, to show what each of them moves."""
        rows = []
        steps = scan.inputs.steps
        for start in sorted({steps * k // 8 for k in (1, 3, 5, 7)}):
            if self.runs.left <= self.reserve:
                break
            moved = scan.look(start, 0, stop=start + 1)
            if moved.moved:
                rows.append((start, moved.moved))
        return tuple(rows)


def _size(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _where(scan: Scan, allowed: int) -> str:
    """Where outputs look ahead, judged by which perturbed steps moved an earlier output."""
    leaks = {m.start: False for m in scan.seen if m.ahead > -inf}
    for moved in scan.seen:
        if moved.ahead > allowed:
            leaks[moved.start] = True
    bad = [start for start, leak in leaks.items() if leak]
    good = [start for start, leak in leaks.items() if not leak]
    if not bad:
        return "nowhere"
    if not good:
        return "everywhere"
    if max(bad) < min(good) and max(bad) < scan.inputs.steps / 2:
        return "at the start"
    # Steps too near to the start to look ahead by more than allowed say nothing.
    return "everywhere" if all(start <= allowed for start in good) else "at some steps"


def _disagreements(leaks: bool, nan: bool | None, gradient: bool | None) -> list[str]:
    said = "leaks" if leaks else "does not leak"
    notes = []
    if nan is not None and nan != leaks:
        notes.append(
            f"A NaN in the future {'reaches' if nan else 'does not reach'} the past although the model {said}: "
            + (
                "0 * NaN is NaN, as in masked attention."
                if nan
                else "nan_to_num, where, a comparison or a maximum hides it."
            )
        )
    if gradient is not None and gradient != leaks:
        notes.append(
            f"Gradients say the opposite although the model {said}: "
            + (
                "the leak is detached or passes through an operation without gradient."
                if leaks
                else "they pass through values that do not change the output."
            )
        )
    return notes


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
        or int(lengths.min()) < 1
        or int(lengths.max()) > first.size(time_axis)
    ):
        raise ValueError(
            f"`lengths` must be a (batch,) tensor of steps from 1 to {first.size(time_axis)}, got {lengths}."
        )
    return inputs


def _report(
    per_mode: dict[str, ModeVerdict],
    distinct: Sequence[str],
    setup: Plan,
    module: nn.Module | None,
    sample_rate: float | None,
    runs: Runs,
) -> CausalityReport:
    steps = setup.inputs.steps
    worst = max(per_mode.values(), key=lambda verdict: verdict.lookahead)
    culprit = next((v.culprit for v in (worst, *per_mode.values()) if v.culprit is not None), None)
    findings = [f for mode in distinct for f in _findings(mode, per_mode[mode], steps, sample_rate)]
    lines = [f"{mode}: {_sentence(per_mode[mode], steps, sample_rate)}" for mode in distinct]
    lines += [f"{mode}: {note}" for mode in distinct for note in per_mode[mode].notes]
    lines += list(setup.notes)
    lines.append(f"cost: {runs.passes} forward passes")
    report = CausalityReport(
        title=f"causality of {type(module).__name__ if module is not None else 'function'}, {steps} input steps",
        findings=tuple(findings),
        lookahead=worst.lookahead,
        culprit=culprit,
        batch_leak=any(verdict.batch_leak for verdict in per_mode.values()),
        per_mode=per_mode,
        steps=steps,
        sample_rate=sample_rate,
        passes=runs.passes,
    )
    if not report.ok and worst.picture:
        lines += ["outputs that move (# in time, ! too early) when one input step (left) moves:", report.plot()]
    return replace(report, summary="\n".join(lines))


def _amount(steps_ahead: int, steps: int, sample_rate: float | None) -> str:
    milliseconds = f" ({1000 * steps_ahead / sample_rate:g} ms)" if sample_rate is not None else ""
    whole = ", all of x: the true one may be longer" if steps_ahead > 0 and steps_ahead >= 0.95 * (steps - 1) else ""
    return f"{steps_ahead} input steps{milliseconds}{whole}"


def _sentence(verdict: ModeVerdict, steps: int, sample_rate: float | None) -> str:
    decided = f"{verdict.examined} of {steps - 1} positions, {verdict.dtype}, {verdict.passes} passes"
    if verdict.causal:
        return f"causal ({decided})"
    return f"look-ahead {_amount(verdict.lookahead, steps, sample_rate)}, {verdict.where if verdict.lookahead > verdict.allowed else 'allowed'} ({decided})"


def _findings(mode: str, verdict: ModeVerdict, steps: int, sample_rate: float | None) -> list[Finding]:
    found = []
    if verdict.lookahead > verdict.allowed:
        blame = verdict.blame
        who = f" {blame}" if blame is not None else ""
        found.append(
            Finding(
                code="causality-leak",
                severity="error",
                message=(
                    f"In {mode} mode the output looks ahead by {_amount(verdict.lookahead, steps, sample_rate)}, {verdict.where}; allowed are {verdict.allowed}. "
                    f"Changing the input from step {verdict.position} on moves the output at step {verdict.moved_from}, by {verdict.output_size:.1e} of the "
                    f"output's rms ({verdict.size:.1e} of the largest change).{who}"
                ),
                advice=blame.advice
                if blame is not None
                else "Compute each output step from inputs up to that step only.",
                module=(blame.module or "") if blame is not None else "",
                phase=mode,
                evidence={
                    "lookahead": verdict.lookahead,
                    "allowed": verdict.allowed,
                    "position": verdict.position,
                    "moved_from": verdict.moved_from,
                    "where": verdict.where,
                    "size": verdict.size,
                    "output_size": verdict.output_size,
                    "dtype": verdict.dtype,
                    "tolerance": verdict.tolerance,
                    "nan_leak": verdict.nan_leak,
                    "gradient_leak": verdict.gradient_leak,
                    **({} if blame is None else blame.evidence()),
                },
            )
        )
    if verdict.batch_leak:
        blame = verdict.batch_blame
        who = f" {blame}" if blame is not None else ""
        found.append(
            Finding(
                code="batch-leak",
                severity="error",
                message=f"In {mode} mode the outputs of one item change when only another item of the batch changes.{who}",
                advice=blame.advice
                if blame is not None
                else "Look for statistics over axis 0: BatchNorm, a mean or a maximum without dim=.",
                module=(blame.module or "") if blame is not None else "",
                phase=mode,
                evidence={} if blame is None else blame.evidence(),
            )
        )
    if verdict.padding_leak:
        found.append(
            Finding(
                code="padding-leak",
                severity="warning",
                message=f"In {mode} mode outputs within `lengths` change when only the padding beyond `lengths` changes.",
                advice="Mask the padding before anything that looks across time: convolutions, norms, attention, pooling.",
                phase=mode,
            )
        )
    return found
