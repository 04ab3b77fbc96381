"""Compare `watches.Plateau` with patience rules on labelled loss curves: `python bench_plateau.py FOLDER`.

`FOLDER` is what `make_curves.py` writes. All rules get the same patience W (10 % of the run, 100 to 1000 steps).
False alarms: rising edges in improving steps, not within W / 2 of the last one, per 10,000 improving steps of healthy
and stalled curves. A stall is caught if the rule says "stalled" at or after its onset; the delay counts in W.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping

from stethoscope import Record
from stethoscope.watches import Plateau

Rule = Callable[[np.ndarray, np.ndarray, int], Iterable[bool]]
LONGEST = 6500


def plateau(loss: np.ndarray, lr: np.ndarray, patience: int) -> Iterator[bool]:
    """`watches.Plateau`, default settings, learning rate given."""
    watch = Plateau(patience=patience)
    state = watch.init()
    for step, (value, rate) in enumerate(zip(loss.tolist(), lr.tolist(), strict=True)):
        records = (Record("loss", value, step, source="step"), Record("lr", rate, step, source="step"))
        state, _ = watch.update(state, records)
        yield state["stalled"] is not None


def plateau_blind(loss: np.ndarray, lr: np.ndarray, patience: int) -> Iterator[bool]:
    """`watches.Plateau` without the learning rate."""
    return plateau(loss, np.ones_like(lr), patience)


def reduce_on_plateau(loss: np.ndarray, lr: np.ndarray, patience: int) -> Iterator[bool]:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau`, its defaults (rel, 1e-4), every step."""
    del lr
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.999, patience=patience, eps=0)
    before = 1.0
    for value in loss.tolist():
        scheduler.step(value)
        after = optimizer.param_groups[0]["lr"]
        yield after < before
        before = after


def early_stopping(loss: np.ndarray, lr: np.ndarray, patience: int) -> Iterator[bool]:
    """Lightning's `EarlyStopping`, its defaults (min_delta 0), every step."""
    del lr
    callback = EarlyStopping("loss", patience=patience)
    for value in torch.from_numpy(loss):
        stop, _ = callback._evaluate_stopping_criteria(value)  # the decision without a trainer
        yield bool(stop)


def on_blocks(patiences: int) -> Rule:
    """Best block mean (W / 20 steps) not beaten for so many W."""

    def patience_on_block_means(loss: np.ndarray, lr: np.ndarray, patience: int) -> Iterator[bool]:
        del lr
        width = max(1, patience // 20)
        best, waited, stalled = np.inf, 0, False
        for step in range(len(loss)):
            if (step + 1) % width == 0:
                mean = np.nanmean(loss[step + 1 - width : step + 1])
                best, waited = (mean, 0) if mean < best else (best, waited + width)
                stalled = waited >= patiences * patience
            yield stalled

    return patience_on_block_means


RULES: dict[str, Rule] = {
    "watches.Plateau": plateau,
    "watches.Plateau, lr not given": plateau_blind,
    "ReduceLROnPlateau": reduce_on_plateau,
    "EarlyStopping": early_stopping,
    "patience on block means, 1 W": on_blocks(1),
    "patience on block means, 2 W": on_blocks(2),
}


def main(folder: Path) -> None:
    """Print one row per rule."""
    index = [e for e in json.loads((folder / "index.json").read_text()) if e["T"] <= LONGEST]
    index = [e for e in index if e["kind"] in ("healthy", "plateau")]
    print(f"{folder.name}: {len(index)} curves, {sum(e['kind'] == 'plateau' for e in index)} stalls")
    print("| rule | false alarms / 10k improving steps | healthy curves with one | caught | median delay | us / step |")
    print("|---|---|---|---|---|---|")
    for name, rule in RULES.items():
        alarms = improving = hit = stalls = caught = healthy = steps = 0
        delays, spent = [], 0.0
        for entry in index:
            curve = np.load(folder / entry["file"])
            loss, code, width = curve["loss"].astype(float), curve["code"], entry["W"]
            began = time.perf_counter()
            says = np.fromiter(rule(loss, curve["lr"].astype(float), width), bool)
            spent, steps = spent + time.perf_counter() - began, steps + len(loss)
            false: list[int] = []
            for at in np.flatnonzero(says & ~np.r_[False, says[:-1]]):
                if code[at] == 1 and (not false or at - false[-1] >= width / 2):
                    false.append(int(at))
            alarms, improving = alarms + len(false), improving + int((code == 1).sum())
            if entry["kind"] == "healthy":
                healthy, hit = healthy + 1, hit + bool(false)
                continue
            stalls += 1
            after = np.flatnonzero(says[entry["onset"] :])
            if len(after):
                caught += 1
                delays.append(after[0] / width)
        print(
            f"| {name} | {1e4 * alarms / improving:.2f} ({alarms} in {improving}) | {hit}/{healthy} | {caught}/{stalls} "
            f"| {np.median(delays):.2f} W | {1e6 * spent / steps:.1f} |"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
