"""What the name of a metric says: its phase, its bare name, whether it is bookkeeping, which other name is meant."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

PHASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "cv", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Every spelling of a phase and the one that is used here."""

SYNONYMS = (("acc", "accuracy", "th_acc", "th_accuracy"), ("ppl", "perplexity"))
"""Bare names that toolkits use for one thing; WeNet calls `th_accuracy` `acc` in validation."""

_ANY_PHASE = "|".join(PHASES)
_PREFIX = re.compile(rf"(?P<phase>{_ANY_PHASE})[_/.-](?:batch_)?(?P<rest>.+)", re.IGNORECASE)
# A standard deviation, std_dev, is no metric of a dev set.
_SUFFIX = re.compile(rf"(?P<rest>.+)(?:/|[_.-](?!dev$|cv$))(?P<phase>{_ANY_PHASE})", re.IGNORECASE)
_LOADER = re.compile(r"/dataloader_idx_\d+$")
_REDUCED = re.compile(r"(?<=[^_])_(?:step|epoch)$")
_TOKEN = re.compile(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*|\d+")

_COUNTED = re.compile(
    r"lrs?|times?|timing|runtime|seconds?|secs?|speed|throughput|memory|mem|vram|gpu|cpu|counts?|num|denom|numerator|"
    r"denominator|flops?|flos|samples|tokens|utts|frames|eta|elapsed|iters?|iterations?|epochs|momentum|wd|decay|dropout|"
    r"temperature|progress|skipped"
)
_COUNTED_PAIR = re.compile(
    r"(learning_rate|(grad|gradient)_norm|batch_size|per_(second|sec)|(global|optimizer)_steps?|current_epoch|"
    r"(loss|grad)_scale)"
)
_COUNTED_ALONE = re.compile(r"epoch|steps?|weights?|n|its?|total")
_RATE = re.compile(r"acc|accuracy|accuracies|f1|auc|auroc|iou|dice|bleu|recall|top[15]")
_SHARE = re.compile(r"precision|sensitivity|specificity|jaccard|auprc|mrr|ndcg|eer")
_RUNNING = re.compile(r"running|moving|ema|cumulative|cum|accumulated")
_LOSS = re.compile(r"loss|losses|nll|kl|elbo|objective|cost|penalty")
_TERM = re.compile(
    r"ce|bce|l1|l2|reg|regulari[sz](?:er|ation)|aux|kd|distill(?:ation)?|adv|gp|vq|commit(?:ment)?|smooth(?:ness)?|tv"
)


class Name(NamedTuple):
    """A metric's name taken apart.

    Args:
        bare: the name without phase, `_step`, `_epoch` and `/dataloader_idx_N`.
        phase: `train`, `val` or `test` if the name says so, else `""`.
    """

    bare: str
    phase: str


@lru_cache(maxsize=4096)
def split(name: str) -> Name:
    """Take a name apart.

    Examples:
        >>> split("valid_loss_epoch/dataloader_idx_1")
        Name(bare='loss', phase='val')
        >>> split("Loss/train"), split("epoch")
        (Name(bare='Loss', phase='train'), Name(bare='epoch', phase=''))
    """
    bare = _LOADER.sub("", name)
    phase = ""
    if found := _PREFIX.fullmatch(bare) or _SUFFIX.fullmatch(bare) or _SUFFIX.fullmatch(_REDUCED.sub("", bare)):
        bare, phase = found["rest"], PHASES[found["phase"].lower()]
    return Name(bare if _COUNTED_PAIR.fullmatch("_".join(tokens(bare))) else _REDUCED.sub("", bare), phase)


def phase(given: str) -> str:
    """Return the usual spelling of a phase: `"cv"` is `"val"`; an unknown one stays as it is."""
    return PHASES.get(given.lower(), given)


def tokens(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case: `"th_accuracy"` and `"thAccuracy"` are `("th", "accuracy")`."""
    return tuple(token.lower() for token in _TOKEN.findall(name))


@lru_cache(maxsize=4096)
def bookkeeping(name: str) -> bool:
    """Whether a name stands for a count, a time, a speed, memory or a setting of training: no result of the model.

    Examples:
        >>> [name for name in ("lr-AdamW", "val_wer_num", "grad_norm", "per_second", "loss") if bookkeeping(name)]
        ['lr-AdamW', 'val_wer_num', 'grad_norm', 'per_second']
    """
    words = tokens(name)
    pairs = pairwise(words)
    return (
        any(map(_COUNTED.fullmatch, words))
        or any(_COUNTED_PAIR.fullmatch(f"{one}_{two}") for one, two in pairs)
        or _COUNTED_ALONE.fullmatch("_".join(words)) is not None
    )


@lru_cache(maxsize=4096)
def rate(name: str) -> bool:
    """Whether a name stands for an accuracy or a relative of it: higher is better, 0 is the worst value."""
    words = tokens(name)
    return any(map(_RATE.fullmatch, words)) and "grad" not in words and "loss" not in words


@lru_cache(maxsize=4096)
def share(name: str) -> bool:
    """Whether a name stands for a share, 0 to 1 or 0 to 100 %, whichever end of it is better."""
    return rate(name) or (any(map(_SHARE.fullmatch, tokens(name))) and "loss" not in tokens(name))


@lru_cache(maxsize=4096)
def running(name: str) -> bool:
    """Whether a name stands for what is carried from step to step: a sum or a mean so far.

    Examples:
        >>> running("running_loss"), running("total_loss")
        (True, False)
    """
    return any(map(_RUNNING.fullmatch, tokens(name)))


@lru_cache(maxsize=4096)
def loss(name: str) -> bool:
    """Whether a name stands for a loss or a term of it, which has a gradient by design."""
    return any(map(_LOSS.fullmatch, tokens(name)))


@lru_cache(maxsize=4096)
def term(name: str) -> bool:
    """Whether a name stands for a loss or for what is usually a term of one, followed in training.

    Examples:
        >>> [name for name in ("ce", "l2_reg", "aux_loss", "wer", "ce_accuracy") if term(name)]
        ['ce', 'l2_reg', 'aux_loss']
    """
    return loss(name) or (any(map(_TERM.fullmatch, tokens(name))) and not rate(name))


def own_loss(name: str) -> bool:
    """Whether a name stands for a loss of one step, which has a graph by design."""
    return loss(name) and not running(name)


def synonyms(bare: str) -> tuple[str, ...]:
    """Return all bare names under which toolkits give the same metric; `()` if there is only this one."""
    return next((group for group in SYNONYMS if bare.lower() in group), ())


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that was most likely meant, None if none is near.

    In this order: a synonym, the same words in another order or case, a spelling at least 0.7 alike (the ratio of
    `difflib`: twice the matching characters over all characters; one typing error in four letters is 0.75) in what
    the two names do not have in common, with the same numbers: `g_loss` and `d_loss`, `top1` and `top5` are two things.

    Examples:
        >>> nearest("th_acuracy", ["loss", "th_accuracy"]), nearest("g_loss", ["d_loss"])
        ('th_accuracy', None)
    """
    by_bare = {split(other).bare: other for other in known if other != name}
    bare = split(name).bare
    for other, full in by_bare.items():
        if other.lower() in synonyms(bare):
            return full
    words = sorted(tokens(bare))
    for other, full in by_bare.items():
        if sorted(tokens(other)) == words:
            return full
    alike = {full: max(_alike(bare, other), _alike(name, full)) for other, full in by_bare.items()}
    best = max(alike, key=alike.__getitem__, default=None)
    return best if best is not None and alike[best] >= 0.7 else None


def _alike(one: str, other: str) -> float:
    """Return how alike two spellings are where they differ, 0 to 1."""
    if re.findall(r"\d+", one) != re.findall(r"\d+", other):
        return 0.0
    words = Counter(tokens(one)), Counter(tokens(other))
    left, right = ("_".join((words[i] - words[1 - i]).elements()) for i in (0, 1))
    return SequenceMatcher(None, left, right).ratio()
