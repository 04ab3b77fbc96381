"""`OutputCollapse`: outputs that are one and the same, silent, constant or not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from stethoscope._record import Finding, Record, Severity
from stethoscope.probes import Separation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State

ALIKE = 0.95  # |cos|; see separation_stats.ALIKE
APART = 0.25  # share of items alike below which the outputs count as once apart
KEEP = 0.8  # of the running mean, per observation
WARM_UP_STEPS = 100  # and 20 observations: with `every=1` healthy runs need some 15 steps to come apart
REFERENCES = 0.818  # |cos| of two references from which equal outputs can reach -10 dB
BEYOND = 3.0  # dB above what orthogonal references allow
FELL = 3.0  # standard deviations of one step
LEARNT = 0.8  # |cos| of outputs in training below which those of another phase are expected apart, too
BATCH = 0.95  # |cos| of outputs for different inputs

Numbers: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class OutputCollapse:
    """Reports outputs of a separator that are alike, silent, constant or not finite.

    **What it decides**, at every observation, on running means (factor 0.8) of the share of items concerned: a state is
    entered where the mean stays at or above `fraction` for `hold` observations, and left at or below half of it.
    *Alike*: an item with |cos| > 0.95 between two outputs, 0.5 in Fisher's z beyond its references, delayed copies too;
    *silent*: an output 40 dB below the loudest and 15 dB more than the references account for; one output only:
    *constant*, the same for different inputs, or a *copy* of the mixture. Judged once outputs were apart (less than 25 %
    of items alike) or after 20 observations and 100 steps, since every run starts with its outputs alike.
    Outside training, outputs that are apart in training (|cos| < 0.8) arm it too, and two observations suffice.
    Alike, and the loss never fell by more than three standard deviations: the run has not started, which is
    `stalled-from-start`. Alike, and the references are too (or SI-SDR is 3 dB better than orthogonal ones allow, or the
    mixture itself has an SI-SDR above 3 dB): `references-alike`.
    **Findings:** `output-collapse`, `output-silent`, `output-constant`, `output-nonfinite`, `stalled-from-start`,
    `references-alike`. **Cost:** host only, per observation. **Needs:** `probes.Separation`.

    Args:
        phase: of the observations, `"train"`, `"val"`, ...
        loss: name of the loss, to see whether it ever fell.
        fraction: share of items concerned, in (0, 1].
        hold: observations in a row.

    Raises:
        ValueError: a number out of its range.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> stuck = series(range(0, 1500, 50), **{"loss": [28.0] + 29 * [0.1], "separation/out_cos": 30 * [0.99]})
        >>> replay(OutputCollapse(), stuck)[0].code
        'output-collapse'

    References:
        SI-SDR and its bounds: Le Roux et al. 2019, arXiv:1811.02508.
    """

    _: KW_ONLY
    phase: str = "train"
    loss: str = "loss"
    fraction: float = 0.3
    hold: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], not {self.fraction!r}.")
        if self.hold < 1:
            raise ValueError(f"hold must be at least one observation, not {self.hold!r}.")

    @property
    def needs(self) -> tuple[Probe, ...]:
        """The probe that measures the outputs."""
        return (Separation(),)

    def init(self) -> State:
        """Nothing seen, not armed."""
        return {
            "seen": 0,
            "first_step": None,
            "armed": False,
            "states": {},
            "nonfinite": False,
            "train_cos": None,
            "loss": {"first": [], "recent": []},
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in one step's records; judge where they hold an observation."""
        now: dict[str, float] = {}
        step = 0
        for record in records:
            value = record.value
            if record.module or not isinstance(value, (int, float)):
                continue
            if record.name == "separation/out_cos" and record.phase == "train" != self.phase and math.isfinite(value):
                state = {**state, "train_cos": float(value)}
            if record.phase != self.phase:
                continue
            if record.name == self.loss and math.isfinite(value):
                state = {**state, "loss": _follow(state["loss"], float(value))}
            elif record.name.startswith("separation/"):
                now[record.name.removeprefix("separation/")], step = float(value), record.step
        if not now:
            return state, ()
        bad = now.get("nonfinite_fraction", 0.0)
        bad = 1.0 if any(math.isnan(now.get(name, 0.0)) for name in ("out_cos", "level_db", "batch_cos")) else bad
        found = [] if bad == 0 or state["nonfinite"] else [self._nonfinite(bad, step)]
        state = {**state, "nonfinite": bad > 0}
        state, more = self._judge(state, {k: v for k, v in now.items() if math.isfinite(v)}, step)
        return state, [*found, *more]

    def _judge(self, state: State, now: Numbers, step: int) -> tuple[State, list[Finding]]:
        learnt = self.phase != "train" and (state["train_cos"] or 1.0) < LEARNT
        shares = _shares(now, fell=learnt or _fell(state["loss"]))
        first = step if state["first_step"] is None else state["first_step"]
        state = {**state, "seen": state["seen"] + 1, "first_step": first}
        together = sum(shares.get(kind, 0.0) for kind in ("alike", "unstarted", "references"))
        long_enough = state["seen"] >= 20 and step >= first + WARM_UP_STEPS
        apart = not state["armed"] and "alike" in shares and (together < APART or learnt)
        armed = state["armed"] or long_enough or apart
        # What the outputs were before they came apart says nothing about what follows.
        state = {**state, "states": {} if apart else state["states"]}
        states, found = {}, []
        hold = self.hold if self.phase == "train" else min(self.hold, 2)  # the model stands still in between
        for kind, share in shares.items():
            usual, streak, active = state["states"].get(kind, (share, 0, False))
            usual = KEEP * usual + (1 - KEEP) * share
            streak = streak + 1 if usual >= self.fraction else 0
            if active and usual <= self.fraction / 2:
                active = False
            elif not active and armed and streak >= hold and share >= self.fraction:
                active = True
                found.append(self._finding(kind, share, now, state, step))
            states[kind] = [usual, streak, active]
        return {**state, "armed": armed, "states": {**state["states"], **states}}, found

    def _finding(self, kind: str, share: float, now: Numbers, state: State, step: int) -> Finding:
        said = _TEXTS[kind](share, now)
        trained = state["train_cos"]
        if kind == "alike" and trained is not None and trained < LEARNT:
            said = _elsewhere(said, trained)
        level = _level(state["loss"])
        message = said.message if level is None else f"{said.message} {self.loss} is {level:.3g}."
        evidence = {**now, "share": share, "loss": level}
        return Finding(said.code, said.severity, message, said.advice, step, phase=self.phase, evidence=evidence)

    def _nonfinite(self, share: float, step: int) -> Finding:
        return Finding(
            "output-nonfinite",
            "error",
            f"{_percent(share)} of the items have NaN or Inf in an output; they count as neither alike nor apart.",
            "Run audits.nonfinite on this batch to find where they begin.",
            step,
            phase=self.phase,
            evidence={"share": share},
        )


def _shares(now: Numbers, *, fell: bool) -> dict[str, float]:
    """Share of items concerned, per kind; a kind that cannot be judged is left out."""
    shares: dict[str, float] = {}
    if "out_cos" in now or "alike_fraction" in now:
        cos = now.get("out_cos", 0.0)
        raw = float(cos > ALIKE)
        same = now.get("alike_fraction", raw)
        if "alike_fraction" not in now and "ref_cos" in now:
            same = float(raw and _fisher(cos) - _fisher(now["ref_cos"]) > 0.5)
        twins = raw * _references_alike(now)
        if "ref_cos" not in now:
            same = same * (1 - twins)
        shares |= {"alike": same * fell, "unstarted": same * (not fell), "references": twins}
    if "quiet_fraction" in now:
        shares["quiet"] = now["quiet_fraction"]
    if "batch_cos" in now:
        same_anyway = _fisher(now["batch_cos"]) - _fisher(now.get("mix_batch_cos", 0.0)) <= 0.5
        shares["constant"] = float(now["batch_cos"] > BATCH and not same_anyway)
    if "copy_fraction" in now and "out_cos" not in now:
        shares["copy"] = now["copy_fraction"]
    return shares


def _references_alike(now: Numbers) -> bool:
    if "ref_cos" in now:
        return now["ref_cos"] > REFERENCES
    score, gain = now.get("si_sdr_db"), now.get("si_sdri_db")
    worst = now.get("worst_si_sdr_db", score)
    if score is not None and gain is not None and score - gain > BEYOND:
        return True
    return worst is not None and worst > _bound_db(now.get("out_cos", 0.0)) + BEYOND


def _fisher(cos: float) -> float:
    return math.atanh(min(abs(cos), 0.99999))


def _bound_db(cos: float) -> float:
    """Best SI-SDR of the worse of two outputs with that |cos| if the references are orthogonal, dB."""
    q = math.sqrt(max(0.0, 1 - cos * cos))
    return 10 * math.log10((1 + q) / max(1 - q, 1e-9))


def _follow(loss: Any, value: float) -> Any:
    first = loss["first"] if len(loss["first"]) == 3 else [*loss["first"], value]
    return {"first": first, "recent": [*loss["recent"], value][-20:]}


def _level(loss: Any) -> float | None:
    return median(loss["recent"]) if loss["recent"] else None


def _fell(loss: Any) -> bool:
    """Whether the loss is lower than it began, by three standard deviations of one step; yes where no loss is known."""
    recent = loss["recent"]
    if len(recent) < 2:
        return not recent
    noise = median(abs(b - a) for a, b in pairwise(recent)) / 0.954  # of the difference of two normal values
    return bool(mean(loss["first"]) - median(recent) > FELL * noise)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _cosines(now: Numbers) -> str:
    delayed = "out_delay_cos" in now and now["out_delay_cos"] > now.get("out_cos", 0.0) + 0.05
    parts = [f"output |cos| {now.get('out_cos', math.nan):.3f}"]
    parts += [f"{now['out_delay_cos']:.3f} with a delay"] if delayed else []
    parts.append(f"reference |cos| {now['ref_cos']:.3f}" if "ref_cos" in now else "references not given")
    parts += [f"mixture |cos| {now['mix_cos']:.3f}"] if "mix_cos" in now else []
    parts += [f"SI-SDR {now['si_sdr_db']:.1f} dB"] if "si_sdr_db" in now else []
    return ", ".join(parts)


def _sources(now: Numbers) -> int:
    return max(2, sum(name.startswith("source") and name.endswith("_si_sdr_db") for name in now))


class Text(NamedTuple):
    """What a finding of one kind says."""

    code: str
    severity: Severity
    message: str
    advice: str


def _collapsed(share: float, now: Numbers) -> Text:
    n = _sources(now)
    bound = 10 * math.log10(1 / (n - 1))
    message = (
        f"Two outputs are alike in {_percent(share)} of the items ({_cosines(now)}). Equal outputs of {n} orthogonal "
        f"sources reach {bound + 0.0:.1f} dB at most."
    )
    advice = (
        "Check that the loss takes the best permutation (not the mean over them, not a fixed or random order) and that "
        "each output reaches the loss; then the masks' last layer and the learning rate."
    )
    return Text(code="output-collapse", severity="error", message=message, advice=advice)


def _elsewhere(said: Text, trained: float) -> Text:
    message = f"{said.message} In training they are apart (|cos| {trained:.3f})."
    advice = (
        "Look at this path, not at the training: a checkpoint that was loaded with strict=False and matched nothing "
        "(audits.checkpoint counts it), other weights, other scaling, or another order of axes."
    )
    return said._replace(message=message, advice=advice)


def _unstarted(share: float, now: Numbers) -> Text:
    message = f"Outputs are alike as at the start in {_percent(share)} of the items ({_cosines(now)}), and the loss never fell."
    advice = (
        "Raise the learning rate (print it: a warm-up or a scheduler may hold it near zero) and check that the optimizer "
        "owns this model's parameters: audits.training(optimizer, model)."
    )
    return Text(code="stalled-from-start", severity="error", message=message, advice=advice)


def _references(share: float, now: Numbers) -> Text:
    del share
    cos = now.get("out_cos", 0.0)
    worst = now.get("worst_si_sdr_db", now.get("si_sdr_db"))
    beyond = (
        "" if worst is None else f" With orthogonal references the worse output could not pass {_bound_db(cos):.1f} dB."
    )
    message = f"Outputs are alike because the references are ({_cosines(now)}).{beyond}"
    advice = (
        "Listen to the references: each must be one source, not the mixture or twice the same file. If they are fine, the "
        "estimates given here are not those that the loss sees: check the inference path and its checkpoint."
    )
    return Text(code="references-alike", severity="warning", message=message, advice=advice)


def _quiet(share: float, now: Numbers) -> Text:
    message = (
        f"An output is silent in {_percent(share)} of the items (level {now.get('level_db', math.nan):.0f} dB re 1)."
    )
    advice = (
        "A dead output gets no gradient: go back to an earlier checkpoint, lower the learning rate, and avoid a ReLU as "
        "the last activation of the masks."
    )
    return Text(code="output-silent", severity="error", message=message, advice=advice)


def _constant(share: float, now: Numbers) -> Text:
    del share
    message = (
        f"The output is the same for different inputs: |cos| {now['batch_cos']:.3f} between items, "
        f"{now.get('mix_batch_cos', math.nan):.3f} between their inputs."
    )
    return Text(
        code="output-constant",
        severity="error",
        message=message,
        advice="The input is ignored: check what reaches the model, and dead layers.",
    )


def _copied(share: float, now: Numbers) -> Text:
    message = f"The output repeats the input in {_percent(share)} of the items (|cos| {now.get('mix_cos', 1.0):.3f})."
    advice = "Nothing is removed: check that the targets differ from the input, and the gain of a skip connection."
    return Text(code="output-collapse", severity="warning", message=message, advice=advice)


_TEXTS: dict[str, Callable[[float, Numbers], Text]] = {
    "alike": _collapsed,
    "unstarted": _unstarted,
    "references": _references,
    "quiet": _quiet,
    "constant": _constant,
    "copy": _copied,
}
