"""`ClassHealth`: a classifier that answers with one class, rare classes that it never learns, targets of one class."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import log
from typing import TYPE_CHECKING

from stethoscope._record import Finding, Histogram
from stethoscope.probes import Classes
from stethoscope.watches._streaks import Judging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

KEEP = 10
"""Observed steps whose counts are added up."""

TIMES, SPAN = 5, 50  # observed steps in a row, and steps that they span: every network begins with one answer
SHARE, UNPLANNED = (
    0.1,
    1000,
)  # of the planned run that they span at least; a long run has a long warm-up. Steps without a plan
YOUNG = 0.25  # share of the planned run within which a rare class may still be learnt
HALF, ENDLESS = 0.5, 5000  # share of the run, steps without a plan: CTC answers with blanks alone for long at first
FEWEST = 8  # items of a batch that says anything about the order of the data: of four one class is chance
ONE = 0.9  # share of a batch: by chance less than once in a million batches of two balanced classes
CHANCE = 1e-9  # that so many items of one class come in a row by themselves
NEVER = 6  # items of a rare class without a single answer of it: what recognises six of ten is so unlucky once in 250
MISSES = log(1 / 0.4)  # each such item makes that 0.4 times as likely; many rare classes ask for more of them
PADDING, MANY, SOLVED = 0.5, 200, 0.9
"""Share of the targets, targets of a step; of the others, from which the task is solved and all is told."""
SLIPS, RARER = 0.001, 0.05
"""Share of a class that is told wrongly, of padding; of the targets that others are at least: then their mistakes are more than that."""
ALL, REST = 0.99, 0.05  # share of the answers, and of all other items that is recognised
FEW = 100  # other items
CONSTANT = 500  # items of one class, all of them: of a class with one item in a hundred some would have come


@dataclass(frozen=True)
class ClassHealth:
    """Reports a classifier that gives nearly all items one class, and rare classes that are hardly ever recognised.

    **What it decides**, from the counts of the last ten observed steps in training, `items` of them at least:

    - `prediction-collapse`: one class gets `collapsed` of the answers, though at most half of the items are of it, for five observed steps
      in a row that span 50 steps and a tenth of the planned run, the learning rate's warm-up left out: every
      network begins like that. Without targets: every single answer is one class, for half of the planned run (5000 steps without a plan).
    - `class-imbalance`: a class, or all classes but the most frequent one together, is `imbalance` times rarer than the most frequent one,
      with `rare` items at least, and less than `recalled` of them are recognised, while more than half of all items are; not in the first
      quarter of a planned run. A class that came first within the last five of these steps is new. Or, in the second half of a planned run, a class as rare has not been answered once since training works, though six of
      its items came (more where many classes are rare), in however many steps. Or, there as well, 99 % of the answers are the class of most
      targets, and less than 5 % of the others (100 items at least) are recognised, for a quarter of the run (5000 steps without a plan);
      a `prediction-collapse` where the others together are not `imbalance` times rarer. Or the batches themselves, of eight items at least, five observed ones in a row that span 50 steps, are of one
      class each (nine tenths): another one from time to time (data in order); or of one class alone that was not alone before (more items in
      a row than chance gives once in 1e9, by its share before), or 500 items from the start.

    Of sequences and images (`tokens/...`), rare classes are none of its business as long as anything but the most frequent one is recognised.

    **Cost:** host only, O(classes) per observed step. **Needs:** `probes.Classes`: `step(loss=loss, logits=..., targets=...)`.

    Args:
        items: items that must have been counted.
        rare: items of a rare class that must have been counted.
        collapsed: share of all answers.
        imbalance: a factor.
        recalled: share of the items of a class that are answered rightly.

    Examples:
        >>> from stethoscope._record import Histogram, Record
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> def step(at):
        ...     for name, counts in (("predicted", (40.0, 0.0)), ("target", (20.0, 20.0)), ("right", (20.0, 0.0))):
        ...         yield Record(f"classes/{name}", Histogram((0.0, 1.0, 2.0), counts), at, kind="histogram")
        >>> [f.code for f in replay(ClassHealth(), [r for at in range(0, 1000, 50) for r in step(at)])]
        ['prediction-collapse']
    """

    _: KW_ONLY
    items: int = 200
    rare: int = 10
    collapsed: float = 0.95
    imbalance: float = 10.0
    recalled: float = 0.3

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Counts per class."""
        return (Classes(),)

    def init(self) -> State:
        """Nothing counted."""
        return {
            "held": {},
            "counts": [],
            "plan": None,
            "lr": None,
            "usual": [],
            "single": [],
            "alone": [0, 0.0, 0.0],
            "unanswered": [],
            "known": [],
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        now: dict[str, list[float]] = {}
        rate = state["lr"]
        for r in records:
            if r.phase != "train":
                continue
            if r.name == "plan/steps" and isinstance(r.value, (int, float)):
                state = {**state, "plan": float(r.value)}
            elif r.name == "lr" and isinstance(r.value, (int, float)):
                rate = float(r.value)
            elif r.name.startswith(("classes/", "tokens/")) and isinstance(r.value, Histogram):
                now[r.name] = list(r.value.counts)
        if not now:
            return state, ()
        group = next(iter(now)).partition("/")[0]
        step, plan = records[0].step, state["plan"]
        warms_up = rate is not None and state["lr"] is not None and rate > state["lr"]
        state = {**state, "lr": rate}
        judging = Judging(state["held"], step, TIMES, SPAN)
        if len(now) < 3:
            self._answers(judging, now[f"{group}/predicted"], HALF * plan if plan else ENDLESS)
            return {**state, "held": judging.held}, judging.findings
        latest = [now[f"{group}/predicted"], now[f"{group}/target"], now[f"{group}/right"]]
        same = [each for each in state["counts"] if len(each[0]) == len(latest[0])]
        counts = [*same, latest][-KEEP:]
        answers, targets, right = (
            [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*counts, strict=True)
        )
        state = self._batches(judging, state, latest[1])
        # what came in the older half of the steps, now or ever, is no newcomer of a curriculum
        older = [each[1] for each in counts[: len(counts) // 2 or 1]]
        known = sorted({*state.get("known", ()), *(i for row in older for i, count in enumerate(row) if count)})
        state = {**state, "known": known}
        total = sum(targets)
        if total >= self.items:
            judging.steps = max(SPAN, int(SHARE * (plan or 0)))
            self._collapse(judging, answers, targets, total, warms_up=warms_up)
            late = step >= HALF * (plan or 0)
            if group == "classes":
                unanswered = _unanswered(state["unanswered"], latest) if sum(right) > 0.5 * total else []
                state = {**state, "unanswered": unanswered}
                if not (plan and step < YOUNG * plan):
                    new = {str(i) for i in range(len(targets)) if i not in known}
                    self._imbalance(judging, targets, right, total, unanswered if late else [], new)
            if group == "tokens":
                _padding(judging, latest, targets, right)
            judging.steps = int(YOUNG * plan if plan and late else plan or ENDLESS)
            self._majority(judging, answers, targets, right, total, latest)
        return {**state, "held": judging.held, "counts": counts}, judging.findings

    @staticmethod
    def _answers(judging: Judging, answers: list[float], span: float) -> None:
        """Judge answers whose targets are not known."""
        most, total = max(answers), sum(answers)
        judging.steps = int(span)
        if judging.model("prediction-collapse", total > 0 and most == total):
            judging.tell(
                Finding(
                    "prediction-collapse",
                    "warning",
                    f"Every answer of the last {span:,.0f} steps is class {answers.index(most)}.",
                    "Of a CTC model that is the blank: look at the bias of the last layer, the learning rate, and whether labels fit their "
                    "inputs and are shorter than the output.",
                ),
                values={"class": answers.index(most), "share": 1.0},
            )

    @staticmethod
    def _batches(judging: Judging, state: State, targets: list[float]) -> State:
        """Judge which classes come together in a batch."""
        total = sum(targets)
        if total < FEWEST:
            return state
        first = targets.index(max(targets))
        one = targets[first] >= ONE * total
        classes = sorted({*state["single"], first}) if one else []
        shares = [count / total for count in targets]
        usual = state["usual"] if len(state["usual"]) == len(shares) else []
        which, alone, before = state[
            "alone"
        ]  # items of one class in a row, and its share before them; 1 where there was nothing
        if targets[first] < total:
            alone = 0.0
        elif alone and which == first:
            alone += total
        else:
            which, alone, before = first, total, usual[first] if usual else 1.0
        ordered = len(classes) > 1
        became = alone > 0 and before < 1 and alone * log(max(before, 1e-3)) < log(CHANCE)
        constant = alone >= CONSTANT and before == 1
        if judging.model("class-imbalance/batches", ordered or became or constant):
            if ordered:
                said = f"Each batch is of one class, {len(classes)} of them in turn so far: the data come in order."
                advice = "Shuffle: shuffle=True in the DataLoader, a sampler, or a buffer for data that are streamed."
            else:
                said = f"All batches{' of late' if became else ''} are of class {first}."
                advice = "Print the targets of one batch: a padding or default label, a filter, or a file that is missing half of its classes."
            judging.tell(
                Finding("class-imbalance", "warning", said, advice),
                values={"class": first, "share": targets[first] / total, "classes": len(classes)},
            )
        usual = [0.9 * old + 0.1 * new for old, new in zip(usual, shares, strict=True)] if usual else shares
        return {**state, "single": classes, "alone": [which, alone, before], "usual": usual}

    def _collapse(
        self, judging: Judging, answers: list[float], targets: list[float], total: float, *, warms_up: bool
    ) -> None:
        most = max(range(len(answers)), key=answers.__getitem__)
        share, meant = answers[most] / total, targets[most] / total
        if judging.model("prediction-collapse", share >= self.collapsed and meant <= 0.5 and not warms_up):
            judging.tell(
                Finding(
                    "prediction-collapse",
                    "warning",
                    f"{share:.0%} of the answers are class {most}, and only {meant:.0%} of the items are: the model ignores its input.",
                    "Look at whether labels belong to their inputs, at the learning rate, the bias of the last layer, and dead units.",
                ),
                values={"class": most, "share": share, "meant": meant},
            )

    def _never(self, unanswered: list[list[float]]) -> list[str]:
        """Rare classes that came often enough since they were last answered."""
        counts, since = [count for count, _ in unanswered], [missed for _, missed in unanswered]
        rare = [i for i, count in enumerate(counts) if count > 0 and self.imbalance * count <= max(counts)]
        enough = NEVER + log(max(1, len(rare))) / MISSES
        return [str(i) for i in rare if since[i] >= enough]

    def _majority(
        self,
        judging: Judging,
        answers: list[float],
        targets: list[float],
        right: list[float],
        total: float,
        latest: list[list[float]],
    ) -> None:
        """Judge a model that says what most targets are, and nothing else."""
        most = targets.index(max(targets))
        others, hits = total - targets[most], sum(right) - right[most]
        majority = answers[most] >= ALL * total and 2 * targets[most] > total and others >= FEW and hits < REST * others
        # what begins to work now, older steps know nothing of
        rare, recognised = (sum(row) - row[most] for row in latest[1:])
        begins = recognised >= REST * max(1.0, rare)
        told = judging.held.get("class-imbalance", {}).get("told")
        if judging.model("majority", majority and not begins and not told):
            share = targets[most] / total
            said = (
                f"{answers[most] / total:.1%} of the answers are class {most}, as {share:.1%} of the targets are; of the {1 - share:.1%} that are "
                f"not, {hits / others:.1%} is recognised."
            )
            values = {"class": most, "share": share, "answered": answers[most] / total, "recall": hits / others}
            if targets[most] < self.imbalance * others:
                advice = "The model ignores its input: look at whether labels belong to their inputs, at the learning rate and at dead units."
                judging.tell(Finding("prediction-collapse", "warning", said, advice), values=values)
                return
            advice = (
                "Is this class padding, background or an unknown token? Leave it out of the loss (ignore_index), weigh it down, or look for labels that "
                "were lost on the way (another vocabulary, masks of another depth)."
            )
            judging.tell(Finding("class-imbalance", "warning", said, advice), values=values)

    def _imbalance(
        self,
        judging: Judging,
        targets: list[float],
        right: list[float],
        total: float,
        unanswered: list[list[float]],
        new: set[str],
    ) -> None:
        most, works = max(targets), sum(right) > 0.5 * total

        def missed(count: float, hit: float) -> bool:
            return works and count >= self.rare and self.imbalance * count <= most and hit < self.recalled * count

        # of many rare classes, each may have too few items to be judged alone
        others = ("", total - most, sum(right) - right[targets.index(most)])
        each = [(str(i), count, hit) for i, (count, hit) in enumerate(zip(targets, right, strict=True))]
        told = [name for name, count, hit in [others, *each] if name not in new and missed(count, hit)]
        if never := [] if told else [name for name in self._never(unanswered) if name not in new]:
            each, most = (
                [(str(i), count, 0.0) for i, (count, _) in enumerate(unanswered)],
                max(c for c, _ in unanswered),
            )
        looked = [name for name, count, _ in [others, *each] if count >= self.rare]  # of few items nobody can tell
        news = judging.hold("class-imbalance", told or never, looked, times=3)
        if not news:
            return
        name, count, hit = next(row for row in [*each, others] if row[0] == news[-1])
        which = f"Class {name} is" if name else "All classes but the most frequent one are, together,"
        judging.tell(
            Finding(
                "class-imbalance",
                "warning",
                f"{which} {most / count:.0f} times rarer than the most frequent one, and {hit / count:.0%} "
                f"of it is recognised, where {sum(right) / total:.0%} of all items are.",
                "Weigh the loss or draw rare classes more often, and watch a balanced metric; look at the sampler.",
            ),
            values={"class": int(name) if name else -1, "count": count, "most": most, "recall": hit / count},
        )


def _padding(judging: Judging, latest: list[list[float]], targets: list[float], right: list[float]) -> None:
    """Judge a class that makes most of the targets and is told with hardly a mistake in a thousand, where others are not."""
    answers, meant, hits = latest
    most = meant.index(max(meant))
    share, others = meant[most] / sum(meant), sum(targets) - targets[most]
    wrong = max(answers[most], meant[most]) - hits[most]
    exact = wrong <= SLIPS * meant[most] and PADDING <= share <= 1 - RARER and sum(meant) >= MANY
    rest = (sum(right) - right[most]) / max(1.0, others)
    if judging.model("padding", exact and others > 0 and rest < SOLVED, times=TIMES):
        judging.tell(
            Finding(
                "class-imbalance",
                "warning",
                f"{share:.0%} of the targets are class {most}, and it is told without a mistake, while {rest:.0%} of the others are right: it looks like padding "
                "that is scored.",
                "Leave it out of the loss (ignore_index, a mask) and of the accuracy: it rules both, and says nothing.",
            ),
            values={"class": most, "share": share, "recall": rest},
        )


def _unanswered(before: list[list[float]], latest: list[list[float]]) -> list[list[float]]:
    """Per class, how many items came since the training works, and how many of them since it was last an answer."""
    predicted, targets, _ = latest
    before = before if len(before) == len(targets) else [[0.0, 0.0]] * len(targets)
    return [
        [count + target, 0.0 if answer else missed + target]
        for (count, missed), answer, target in zip(before, predicted, targets, strict=True)
    ]
