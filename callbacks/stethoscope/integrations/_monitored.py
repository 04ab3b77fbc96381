"""Which metric keys a framework's callbacks and schedulers ask for, and which a Lightning loop is going to log.

Read by duck typing: no framework is imported.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_PLACE = re.compile(r"\{\s*([^{}:!\[\]]+?)\s*(?:[:!\[][^{}]*)?\}")
_ALWAYS = frozenset({"epoch", "step", "global_step"})
"""What Lightning itself puts into a checkpoint's name."""


def lightning(trainer: Any) -> list[tuple[str, str]]:
    """Return (who, key) for every key that a Lightning trainer's callbacks and schedulers ask for.

    These are `monitor` of EarlyStopping, ModelCheckpoint and their like, the placeholders of a checkpoint's `filename`,
    and `monitor` of a ReduceLROnPlateau, which is known once `fit` has set up the optimizers.
    """
    asked: list[tuple[str, str]] = []
    for callback in getattr(trainer, "callbacks", ()):
        who = type(callback).__name__
        key = getattr(callback, "monitor", None)
        if isinstance(key, str):
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
    the source of the module or of a callback counts as logged, since hooks such as `on_train_epoch_end` have not run
    yet.
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
    ran_val = bool(getattr(trainer, "num_sanity_val_steps", 0)) and bool(held or known["val"])
    asked = {key for _, key in lightning(trainer)}
    known["train"] |= held | _quoted(
        asked, [getattr(trainer, "lightning_module", None), *getattr(trainer, "callbacks", ())]
    )
    return known if ran_val or known["val"] else {"train": known["train"]}


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


def _quoted(keys: set[str], things: list[Any]) -> set[str]:
    sources = []
    for thing in things:
        for cls in type(thing).__mro__:
            if cls.__module__.partition(".")[0] in {
                "builtins",
                "torch",
                "lightning",
                "pytorch_lightning",
                "stethoscope",
            }:
                continue
            try:
                sources.append(inspect.getsource(cls))
            except (OSError, TypeError):
                continue
    text = "\n".join(sources)
    return {key for key in keys if f'"{key}"' in text or f"'{key}'" in text}
