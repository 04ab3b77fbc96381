"""Which metric keys a framework's callbacks and schedulers ask for, and which a Lightning loop is going to log.

Read by duck typing: no framework is imported.
"""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_PLACE = re.compile(r"\{\s*([^{}:!\[\]]+?)\s*(?:[:!\[][^{}]*)?\}")
_ALWAYS = frozenset({"epoch", "step"})
"""What a ModelCheckpoint knows without being told, for its name and as its monitor."""
_ASKED = re.compile(r"""(?:monitor["']?\s*[:=]\s*|EarlyStopping\(\s*)(?:"[^"]*"|'[^']*')""")
"""A name in quotes by which source code asks for a metric."""
_LOGS = re.compile(r"(?:self|module|model)\.log(?:_dict)?\(")
_FRAMEWORKS = frozenset({"builtins", "torch", "lightning", "pytorch_lightning", "stethoscope"})


def lightning(trainer: Any) -> list[tuple[str, str]]:
    """Return (who, key) for every key that a Lightning trainer's callbacks and schedulers ask for.

    These are `monitor` of EarlyStopping, ModelCheckpoint and their like, the placeholders of a checkpoint's `filename`,
    and `monitor` of a ReduceLROnPlateau, which is known once `fit` has set up the optimizers.
    """
    asked: list[tuple[str, str]] = []
    for callback in getattr(trainer, "callbacks", ()):
        who = type(callback).__name__
        key = getattr(callback, "monitor", None)
        if isinstance(key, str) and not (key in _ALWAYS and hasattr(callback, "filename")):
            asked.append((who, key))
        template = getattr(callback, "filename", None)
        if isinstance(template, str):
            asked += [(f"{who}'s filename", key) for key in _PLACE.findall(template) if key not in _ALWAYS]
    for config in getattr(trainer, "lr_scheduler_configs", ()):
        if getattr(config, "reduce_on_plateau", False) and isinstance(config.monitor, str):
            asked.append((type(config.scheduler).__name__, config.monitor))
    return list(dict.fromkeys(asked))


def lightning_known(trainer: Any) -> dict[str, set[str]]:
    """Return phase -> names that a Lightning run has logged, or has begun to gather for the end of its epoch.

    Call it after the first training batch: validation has run once then in the sanity check. A name in quotes in
    the source of the module or of a callback counts as logged, unless it is asked for there. A phase is left out while
    its names cannot be known: train where a module or callback that logs has a hook of its own at the end of the epoch, val where it
    has logged nothing so far or something in it depends on `sanity_checking`.
    """
    held = set(getattr(trainer, "callback_metrics", {})) | set(getattr(trainer, "logged_metrics", {}))
    loop = getattr(trainer, "fit_loop", None)
    known: dict[str, set[str]] = {"train": set(), "val": set()}
    val_loop = getattr(getattr(loop, "epoch_loop", None), "val_loop", None)
    for phase, results in (("train", getattr(loop, "_results", None)), ("val", getattr(val_loop, "_results", None))):
        for result in (results or {}).values():
            meta = result.meta
            loader = "" if meta.dataloader_idx is None else f"/dataloader_idx_{meta.dataloader_idx}"
            forked = ("", "_step", "_epoch") if meta.on_step and meta.on_epoch else ("",)
            known[phase] |= {f"{meta.name}{fork}{loader}" for fork in forked}
    sources = [
        _source(each) for each in (getattr(trainer, "lightning_module", None), *getattr(trainer, "callbacks", ()))
    ]
    text = "\n".join(sources)
    logging = _ASKED.sub("", text)
    known["train"] |= held | {key for _, key in lightning(trainer) if f'"{key}"' in logging or f"'{key}'" in logging}
    if any("def on_train_epoch_end" in source and _LOGS.search(source) for source in sources):
        del known["train"]
    if not known["val"] or "sanity_checking" in text:
        del known["val"]
    return known


def lightning_absent(trainer: Any) -> set[str]:
    """Return the phases that a Lightning fit does not have: val where it has no loader, no step or no batches."""
    return set() if getattr(trainer, "enable_validation", True) else {"val"}


def huggingface(args: Any, callbacks: Iterable[Any] = ()) -> list[tuple[str, str]]:
    """Return (who, key) for what `transformers.TrainingArguments` and callbacks ask of the evaluation."""
    key = getattr(args, "metric_for_best_model", None)
    if not isinstance(key, str):
        return []
    full = key if key.startswith("eval_") else f"eval_{key}"
    asked = [("metric_for_best_model", full)]
    if "plateau" in str(getattr(args, "lr_scheduler_type", "")).lower():
        asked.append(("ReduceLROnPlateau", full))
    asked += [(type(each).__name__, full) for each in callbacks if hasattr(each, "early_stopping_patience")]
    return asked


def _source(thing: object) -> str:
    """Return the source of an object's classes as far as they are the user's; `""` where it is not to be had."""
    sources = []
    for cls in type(thing).__mro__:
        if cls.__module__.partition(".")[0] not in _FRAMEWORKS:
            with suppress(OSError, TypeError):
                sources.append(inspect.getsource(cls))
    return "\n".join(sources)
