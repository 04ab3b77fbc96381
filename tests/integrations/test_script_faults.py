"""An error of ours at any line of `stethoscope run` below a script: the script trains as if we were not there, and it is said."""

import gc
import itertools
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from stethoscope.integrations._script._script import Script
from stethoscope.integrations._script._settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1]))

from faulty import FailOn

FOLDERS = ("integrations/_script", "integrations/_loss.py", "integrations/_validation.py")
WRAPPERS = {"backward", "scale", "step", "call", "excepthook", "_note", "<lambda>", "<genexpr>", "say", "end"}
"""What holds the guards themselves, and what has one of its own."""
TAKES_OFF = {"_take_off", "_unhook", "close", "undo", "abandon"}
"""Where these fail, what they were to take off stays: nobody else knows where it is."""


class OptimizedModule(nn.Module):
    """What `torch.compile` makes, without the compiling, which takes its time where each line is looked at."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, x):
        return self._orig_mod(x)


def script_of_somebody():
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.LayerNorm(16), nn.Linear(16, 1))
    critic = OptimizedModule(nn.Linear(1, 1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01), torch.optim.Adam(critic.parameters())]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(4):
        outputs = model(torch.randn(4, 8))
        loss = outputs.square().mean() + 0 * critic(outputs.detach()).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        if step % 2:
            model.eval()
            with torch.no_grad():
                model(torch.randn(4, 8))
            model.train()
    weights = [*model.parameters(), *critic.parameters()]
    return [*weights, torch.get_rng_state(), torch.tensor(random.random())], (model, critic)


def begin(folder, fault):
    """Run it; return what it has trained, and the modules."""
    script = Script(Settings(target="train.py", to=str(folder), every=2, preset="full", guard="skip", pid=os.getpid()))
    try:
        with fault:
            script.begin()
            result = script_of_somebody()
    finally:
        with fault:
            script.end()
    return result


def left_behind(modules):
    for _ in range(3):
        gc.collect()  # what torch may be at work with is taken off when it is not
    found = [len(m._forward_hooks) + len(m._forward_pre_hooks) for each in modules for m in each.modules()]
    return sum(found) + len(_global_optimizer_post_hooks) + len(_global_optimizer_pre_hooks)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stride", [31, pytest.param(5, marks=pytest.mark.slow)], ids=["some", "many"])
def test_an_error_of_ours_at_any_line_never_reaches_the_script(stride, tmp_path, capsys, caplog):
    gc.collect()
    alone, modules = script_of_somebody()
    before = left_behind(modules)
    backward = torch.autograd.backward
    begin(tmp_path / "run", FailOn(None, 0, RuntimeError, FOLDERS, WRAPPERS | TAKES_OFF))  # imports what it needs
    every = FailOn(None, 0, RuntimeError, FOLDERS, WRAPPERS | TAKES_OFF)
    begin(tmp_path / "run", every)
    places = [(place, n) for place, visits in every.seen.items() for n in {0, visits - 1}][::stride]
    failed, wrong = 0, []
    for (place, n), error in zip(places, itertools.cycle((RuntimeError, MemoryError, OSError))):
        capsys.readouterr()
        fault = FailOn(place, n, error, FOLDERS, WRAPPERS | TAKES_OFF)
        trained, modules = begin(tmp_path / "run", fault)
        said = capsys.readouterr().err + caplog.text  # that of a failure before our handler is there
        caplog.clear()
        failed += fault.at is not None
        what = {
            "trained otherwise": not all(torch.equal(a, b) for a, b in zip(trained, alone, strict=True)),
            "left torch wrapped": torch.autograd.backward is not backward,
            "left hooks": left_behind(modules) != before,
            "said nothing": fault.at is not None and "injected" not in said,
        }
        wrong += [f"{fault.at} ({n}) {how}" for how, is_so in what.items() if is_so]
    assert wrong == []
    assert failed > 0.9 * len(places)
