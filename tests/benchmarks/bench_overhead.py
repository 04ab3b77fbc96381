"""What observing costs: ratios of process time per training step with and without, from interleaved pairs in one run.

    python tests/benchmarks/bench_overhead.py [--pairs 30] [--models transformer tcn tiny] [--peers]

Prints the median ratio and the lower 95 % bound (a bootstrap over the pairs) for each way of looking at the model, and how many
operations of torch and calls in Python a step has more than one without.
One thread; the order inside of each pair alternates, so that a machine that slows down favours neither side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from stethoscope import Monitor, presets, probes, watches

if TYPE_CHECKING:
    from collections.abc import Callable


def transformer() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return model, torch.randn(16, 64, 128)


def tcn() -> tuple[nn.Module, torch.Tensor]:
    blocks = []
    for i in range(8):
        blocks += [nn.Conv1d(64, 64, 3, padding=2**i, dilation=2**i), nn.PReLU(), nn.GroupNorm(1, 64)]
    return nn.Sequential(*blocks), torch.randn(4, 64, 2000)


def tiny() -> tuple[nn.Module, torch.Tensor]:
    blocks = [part for _ in range(60) for part in (nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh())]
    return nn.Sequential(*blocks), torch.randn(16, 16)


MODELS = {"transformer": transformer, "tcn": tcn, "tiny": tiny}


class Loop:
    """One model, trained step by step, with whatever looks at it."""

    def __init__(self, make: Callable[[], tuple[nn.Module, torch.Tensor]]) -> None:
        torch.manual_seed(0)
        self.model, self.x = make()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.monitor: Monitor | None = None
        self.guarded = False
        self.loss = torch.zeros(())

    def step(self) -> None:
        self.loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad()
        self.loss.backward()
        if self.guarded:
            self.monitor.observe(batch=self.x, loss=self.loss)
        self.optimizer.step()
        if self.monitor is not None:
            self.monitor.step(loss=self.loss)


@contextmanager
def monitored(loop: Loop, **arguments):
    with Monitor(loop.model, loop.optimizer, **arguments) as loop.monitor:
        if arguments.get("every", 1) > 1:
            loop.step()  # step 0 is observed; the rest is not
        loop.guarded = "guard" in arguments
        yield
    loop.monitor, loop.guarded = None, False


@contextmanager
def hooks(loop: Loop, hook):
    handles = [module.register_forward_hook(hook) for module in loop.model.modules()]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def fused_norm(loop: Loop):
    def look(optimizer, args, kwargs) -> None:
        grads = [p.grad for p in loop.model.parameters() if p.grad is not None]
        torch.stack(torch._foreach_norm(grads)).norm().item()

    handle = loop.optimizer.register_step_pre_hook(look)
    yield
    handle.remove()


def seven_items(module, args, output) -> None:
    x = output[0] if isinstance(output, tuple) else output
    if isinstance(x, torch.Tensor):
        x = x.detach()
        _ = [f().item() for f in (x.mean, x.std, x.min, x.max, x.norm, x.isnan().sum, x.isinf().sum)]


NEVER = 1_000_000
OURS = {
    "attached, step not observed": lambda loop: monitored(loop, probes=[probes.Activations()], every=NEVER),
    "flags every step": lambda loop: monitored(loop, watches=[watches.NonFinite()], every=NEVER),
    "guard on": lambda loop: monitored(loop, guard="skip", every=NEVER),
    "observed step, default statistics": lambda loop: monitored(loop, probes=[probes.Activations()], every=1),
    "first_aid(), observed step": lambda loop: monitored(loop, **presets.first_aid(), every=1),
    "first_aid(), other steps": lambda loop: monitored(loop, **presets.first_aid(), every=NEVER),
    "full(), observed step": lambda loop: monitored(loop, **presets.full(), every=1),
    "full(), other steps": lambda loop: monitored(loop, **presets.full(), every=NEVER),
}
PLAIN = {
    "one fused norm of all gradients": fused_norm,
    "empty hooks": lambda loop: hooks(loop, lambda *_: None),
    "seven .item() per module": lambda loop: hooks(loop, seven_items),
}


@contextmanager
def anomaly(loop: Loop):
    plain = loop.step

    def watched() -> None:
        # around the observed loop alone: the switch is global
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly(check_nan=True):
                plain()

    loop.step = watched  # type: ignore[method-assign]
    yield
    del loop.step


@contextmanager
def wandb_watch(loop: Loop):
    import wandb

    run = wandb.init(mode="offline", dir="/tmp", settings=wandb.Settings(x_disable_stats=True, console="off"))
    run.watch(loop.model, log="all", log_freq=1)
    plain = loop.step

    def logged() -> None:
        plain()
        run.log({"loss": 0.0})

    loop.step = logged  # type: ignore[method-assign]
    yield
    del loop.step
    run.unwatch(loop.model)
    run.finish()


@contextmanager
def underflow_overflow(loop: Loop):
    from transformers.debug_utils import DebugUnderflowOverflow

    debug = DebugUnderflowOverflow(loop.model, max_frames_to_save=21)
    yield
    for module in loop.model.modules():
        module._forward_hooks.clear()  # it has no way to remove them
    del debug


PEERS = {
    "torch.autograd.detect_anomaly": anomaly,
    "wandb.watch(log='all', log_freq=1)": wandb_watch,
    "transformers DebugUnderflowOverflow": underflow_overflow,
}


def timed(loop: Loop, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        loop.step()
    return (time.process_time() - start) / repeats


def ratio(make, look, pairs: int) -> tuple[float, float, float]:
    """Median ratio, its lower 95 % bound, and the plain step in milliseconds."""
    bare, seen = Loop(make), Loop(make)
    for _ in range(3):
        bare.step(), seen.step()
    with look(seen):
        seen.step()
        repeats = max(1, round(0.03 / timed(bare, 2)))
        ratios, plain = [], []
        for i in range(pairs):
            first, second = (bare, seen) if i % 2 else (seen, bare)
            times = {id(first): timed(first, repeats), id(second): timed(second, repeats)}
            ratios.append(times[id(seen)] / times[id(bare)])
            plain.append(times[id(bare)])
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    return statistics.median(ratios), float(np.quantile(np.median(draws, axis=1), 0.05)), statistics.median(plain) * 1e3


def operations(make, look) -> tuple[int, int]:
    """Operations of torch and calls of Python functions that a step has more than one without: no noise is in them."""
    counts = []
    for observed in (False, True):
        loop = Loop(make)
        with look(loop) if observed else nullcontext():
            for _ in range(3):
                loop.step()  # tensors that are put off, layouts and the like are known from here on
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                loop.step()
            calls = 0

            def count(frame, event, argument) -> None:
                nonlocal calls
                calls += event == "call"

            sys.setprofile(count)
            loop.step()
            sys.setprofile(None)
        counts.append((sum(each.count for each in profile.key_averages() if each.key.startswith("aten::")), calls))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def table(head: str, rows: dict[str, dict[str, str]], models: list[str]) -> None:
    print(f"\n| {head} | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    for label, cells in rows.items():
        print(f"| {label} | {' | '.join(cells[name] for name in models)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    looks = {**OURS, **PLAIN, **(PEERS if arguments.peers else {})}
    looks = {label: look for label, look in looks.items() if arguments.only in label}
    ratios: dict[str, dict[str, str]] = {}
    counted: dict[str, dict[str, str]] = {}
    for name in arguments.models:
        print(f"\n{name}")
        measured = {}
        for label, look in looks.items():
            median, low, step = measured[label] = ratio(MODELS[name], look, arguments.pairs)
            print(f"  {label:40s} {median:6.3f}   (at least {low:.3f}; plain step {step:.1f} ms)", flush=True)
        for preset in ("first_aid()", "full()"):
            kinds = [measured.get(f"{preset}, {kind}") for kind in ("observed step", "other steps")]
            if all(kinds):
                # the bound of a sum of two bounds is a little too low, by far less than what a run differs from the next
                measured[f"{preset} at every=50, from the two"] = [
                    (a + 49 * b) / 50 for a, b in zip(*kinds, strict=True)
                ]
        for label, (median, low, _) in measured.items():
            ratios.setdefault(label, {})[name] = f"{median:.3f} [{low:.3f}]"
        for label in looks.keys() & OURS.keys() - {"guard on"}:
            torches, pythons = operations(MODELS[name], OURS[label])
            counted.setdefault(label, {})[name] = f"{torches:,} + {pythons:,}"
    table("process time, with / without", ratios, arguments.models)
    ours = {label: counted[label] for label in OURS if label in counted}
    table("more per step: operations of torch + calls in Python", ours, arguments.models)


if __name__ == "__main__":
    main()
