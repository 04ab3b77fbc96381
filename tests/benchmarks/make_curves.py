"""Train forty small models and keep their loss curves with what is known about them: `python make_curves.py FOLDER [SEED]`.

Every curve is a real training (a few seconds on one thread). Half are healthy, in the others a fault with a known step
is built in. `FOLDER/index.json` lists them, `FOLDER/<name>.npz` holds per step: loss, lr, clean (loss on a fixed
probe set, every T / 200 steps, interpolated) and a code: 0 gray, 1 improving (the clean level falls by at least 2 % of
its total drop within the next max(T / 8, t / 2) steps), 2 flat, 4 after the fault.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def teacher(g: torch.Generator) -> tuple[nn.Module, Any, Any]:
    """Regression of a random tanh network, with label noise."""
    truth = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def batch(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 16, generator=g)
        with torch.no_grad():
            return x, truth(x) * 3 + 0.3 * torch.randn(n, 1, generator=g)

    return model, batch, lambda out, y: (out - y).pow(2).mean()


def spirals(g: torch.Generator) -> tuple[nn.Module, Any, Any]:
    """Three noisy spirals, cross entropy."""
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))

    def batch(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (n,), generator=g)
        r = torch.rand(n, generator=g)
        angle = 4 * r + y * 2.094 + 0.15 * torch.randn(n, generator=g)
        return 3 * torch.stack([r * angle.cos(), r * angle.sin()], 1), y

    return model, batch, nn.functional.cross_entropy


class Markov(nn.Module):
    """Next-symbol model over a random second-order Markov source."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(12, 24), nn.GRU(24, 32, batch_first=True), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0]).transpose(1, 2)


def language(g: torch.Generator) -> tuple[nn.Module, Any, Any]:
    """Symbols of a Markov source, cross entropy."""
    table = torch.softmax(2 * torch.randn(12, 12, 12, generator=g), -1)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        rows = [torch.randint(12, (n,), generator=g), torch.randint(12, (n,), generator=g)]
        for _ in range(11):
            rows.append(torch.multinomial(table[rows[-2], rows[-1]], 1, generator=g)[:, 0])
        s = torch.stack(rows, 1)
        return s[:, :-1], s[:, 1:]

    return Markov(), batch, nn.functional.cross_entropy


def images(g: torch.Generator) -> tuple[nn.Module, Any, Any]:
    """Where is the bar? Eight classes of oriented bars in noise, a small convolutional net."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)
    )
    line = torch.linspace(-1, 1, 12)
    yy, xx = torch.meshgrid(line, line, indexing="ij")

    def batch(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(8, (n,), generator=g)
        angle = (y * torch.pi / 8)[:, None, None]
        offset = 0.6 * torch.randn(n, 1, 1, generator=g)
        bar = torch.exp(-(((xx * angle.cos() + yy * angle.sin() - offset) / 0.2) ** 2))
        return (bar + 0.7 * torch.randn(n, 12, 12, generator=g))[:, None], y

    return model, batch, nn.functional.cross_entropy


class Separator(nn.Module):
    """A masker on a learned filterbank, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(1, 32, 16, 8, bias=False), nn.ConvTranspose1d(32, 1, 16, 8, bias=False)
        self.mask = nn.Sequential(nn.Conv1d(32, 48, 5, padding=2), nn.PReLU(), nn.Conv1d(48, 64, 5, padding=2))

    def forward(self, mixture: Tensor) -> Tensor:
        code = self.encode(mixture[:, None])
        masks = torch.sigmoid(self.mask(code)).unflatten(1, (2, 32))
        out = self.decode((masks * code[:, None]).flatten(0, 1)).unflatten(0, (-1, 2))[:, :, 0]
        return nn.functional.pad(out, (0, mixture.shape[-1] - out.shape[-1]))


def si_sdr(estimate: Tensor, target: Tensor) -> Tensor:
    """In dB; Le Roux et al. 2019, zero-mean."""
    estimate, target = estimate - estimate.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / (target.pow(2).sum(-1, keepdim=True) + 1e-8)
    wanted = scale * target
    return 10 * torch.log10(wanted.pow(2).sum(-1) / ((estimate - wanted).pow(2).sum(-1) + 1e-8) + 1e-8)


def separation(g: torch.Generator) -> tuple[nn.Module, Any, Any]:
    """Two harmonic voices, one low, one high; PIT over negative SI-SDR in dB."""
    time = torch.arange(800) / 8000

    def voice(n: int, low: float, high: float) -> Tensor:
        pitch = low + (high - low) * torch.rand(n, 1, 1, generator=g)
        gains = torch.rand(n, 4, 1, generator=g) / torch.arange(1, 5)[:, None]
        phases = 6.283 * torch.rand(n, 4, 1, generator=g)
        return (gains * torch.sin(6.283 * pitch * torch.arange(1, 5)[:, None] * time + phases)).sum(1)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        sources = torch.stack([voice(n, 90, 180), voice(n, 300, 700)], 1)
        sources = sources / sources.std(-1, keepdim=True)
        return sources.sum(1), sources

    def loss(out: Tensor, y: Tensor) -> Tensor:
        pairs = -si_sdr(out[:, :, None], y[:, None])
        return torch.minimum(pairs[:, 0, 0] + pairs[:, 1, 1], pairs[:, 0, 1] + pairs[:, 1, 0]).mean() / 2

    return Separator(), batch, loss


TASKS = {f.__name__: f for f in (teacher, spirals, language, images, separation)}
RATE = {"teacher": 1e-3, "spirals": 2e-3, "language": 3e-3, "images": 2e-3, "separation": 2e-3}


def schedule(kind: str, share: float) -> float:
    """Learning rate factor at a share of the run."""
    if kind == "cosine":
        return 0.5 * (1 + np.cos(np.pi * share)) * min(1.0, share / 0.05 + 0.02)
    if kind == "steps":
        return 0.1 ** sum(share > at for at in (0.6, 0.85))
    return 1.0


def plan() -> list[dict[str, Any]]:
    """All runs: twenty healthy, twenty with a fault."""
    healthy = [
        {"task": task, "schedule": kind, "optimizer": optimizer, "size": size, "steps": steps}
        for task, (kind, optimizer, size, steps) in itertools.product(
            TASKS,
            [
                ("constant", "adam", 16, 1500),
                ("cosine", "adam", 32, 1200),
                ("steps", "sgd", 16, 1500),
                ("constant", "sgd", 4, 2000),
            ],
        )
    ]
    faults = [
        {"task": task, "schedule": "constant", "optimizer": "adam", "size": 16, "steps": 1200, "fault": fault, "at": at}
        for task, (fault, at) in itertools.product(
            TASKS, [("lr cut to 1e-4", 400), ("parameters frozen", 250), ("other parameters", 0), ("wrong targets", 0)]
        )
    ]
    return healthy + faults


def run(spec: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Train once; see the module's docstring for what comes back."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model, batch, loss_of = TASKS[spec["task"]](g)
    owned = model
    fault, at = spec.get("fault"), spec.get("at", 0)
    if fault == "other parameters":  # the optimizer holds those of a copy
        owned = TASKS[spec["task"]](torch.Generator().manual_seed(seed))[0]
    adam, rate = spec["optimizer"] == "adam", RATE[spec["task"]]
    parameters = list(owned.parameters())
    optimizer = (
        torch.optim.Adam(parameters, lr=rate, foreach=False)
        if adam
        else torch.optim.SGD(
            parameters, lr=10 * rate if spec["task"] != "separation" else 30 * rate, momentum=0.9, foreach=False
        )
    )
    base = optimizer.param_groups[0]["lr"]
    steps = spec["steps"]
    probe = batch(256)
    losses, rates, level = [], [], []
    for step in range(steps):
        factor = schedule(spec["schedule"], step / steps)
        if fault == "lr cut to 1e-4" and step >= at:
            factor = 1e-4
        optimizer.param_groups[0]["lr"] = base * factor
        if step % (steps // 200) == 0:
            with torch.no_grad():
                level.append(loss_of(model(probe[0]), probe[1]).item())
        x, y = batch(spec["size"])
        if fault == "wrong targets":
            y = y[torch.randperm(len(y), generator=g)]
        loss = loss_of(model(x), y)
        model.zero_grad()
        loss.backward()
        if fault == "parameters frozen" and step >= at:
            model.zero_grad()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"])
    return label(np.array(losses), np.array(rates), np.array(level), at if fault else None)


def label(loss: np.ndarray, lr: np.ndarray, level: np.ndarray, fault: int | None) -> dict[str, np.ndarray]:
    """Say from hindsight which steps were improving."""
    steps = len(loss)
    padded = np.pad(level, 4, mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, 9), axis=1)
    clean = np.interp(np.arange(steps), np.arange(len(level)) * (steps // 200), smooth)
    code = np.zeros(steps, np.int8)
    end = steps if fault is None else fault
    drop = clean[0] - clean[:end].min() if end else 0.0
    for t in range(end):
        ahead = int(max(steps / 8, t / 2))
        fall = (clean[t] - clean[t : min(t + ahead, end)].min()) / max(drop, 1e-12)
        code[t] = 1 if fall >= 0.02 else 2 if fall < 0.01 and t + ahead < end else 0
    code[end:] = 4
    return {"loss": loss, "lr": lr, "clean": clean, "code": code}


def main(folder: Path, first_seed: int = 7000) -> None:
    """Write every curve and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, spec in enumerate(plan()):
        name = "-".join(str(spec[key]) for key in ("task", "schedule", "optimizer", "size", "fault") if key in spec)
        name = name.replace(" ", "_")
        curve = run(spec, seed=first_seed + number)
        np.savez_compressed(folder / f"{name}.npz", **curve)
        kind = "plateau" if "fault" in spec else "healthy"
        index.append(
            {"name": name, "file": f"{name}.npz", "kind": kind, "onset": spec.get("at", -1), "T": spec["steps"]}
            | {"W": max(100, spec["steps"] // 10), "src": "trained", "sub": spec.get("fault", spec["schedule"])}
        )
        print(name, f"{curve['loss'][:50].mean():.3f} -> {curve['loss'][-50:].mean():.3f}", flush=True)
    (folder / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
