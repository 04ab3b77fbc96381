"""A small training, and faults at any line of ours: what the tests of reliability share."""

import linecache
import sys
import threading
from pathlib import Path

import torch
from torch import nn

import stethoscope

HOME = str(Path(stethoscope.__file__).parent)
CANNOT_FAIL = ("try:", "with ", "if ", "return", "set_grad_enabled(", "torch._C._set_grad_enabled(")
"""What stands before the `try` of a hook: comparisons, and torch's own switch. A `with` is visited again on the way out."""


class FailAt:
    """Raises at the n-th line that is run below a folder of ours, once; an interrupt comes on the main thread only."""

    def __init__(self, n, error, folders=("",)):
        self.left, self.error = n, error
        self.within = tuple(f"{HOME}/{folder}" for folder in folders)
        self.at = None

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.within):
            return None
        return self.line

    def line(self, frame, event, arg):
        if event == "line" and self.at is None:
            self.left -= 1
            place = frame.f_code.co_filename, frame.f_lineno
            if self.left < 0 and not linecache.getline(*place).lstrip().startswith(CANNOT_FAIL):
                self.at = "{}:{}".format(*place)
                raise self.error(f"injected at {self.at}")
        return self.line

    def __enter__(self):
        sys.settrace(self)
        if issubclass(self.error, Exception):
            threading.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        threading.settrace(None)


class FailOn(FailAt):
    """Raises when a line is run for the n-th time. Without a line, keeps how often each is run, and lets them pass."""

    def __init__(self, place, n, error, folders, apart=()):
        super().__init__(n, error, folders)
        self.place, self.apart, self.seen = place, apart, {}

    def __call__(self, frame, event, arg):
        return None if frame.f_code.co_name in self.apart else super().__call__(frame, event, arg)

    def line(self, frame, event, arg):
        place = frame.f_code.co_filename, frame.f_lineno
        if self.place is None:
            if event == "line" and not linecache.getline(*place).lstrip().startswith(CANNOT_FAIL):
                self.seen[place] = self.seen.get(place, 0) + 1
            return self.line
        return super().line(frame, event, arg) if place == self.place else self.line


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def make():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def hooks(model):
    found = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return found + [p._backward_hooks for p in model.parameters() if p._backward_hooks]


def batch(step):
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step))


def same_weights_as_unobserved(model, written):
    twin, optimizer = make()
    for step in written:
        x = batch(step)
        optimizer.zero_grad()
        (twin(x) - x).square().mean().backward()
        optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
