"""Trainings that look ill and are well: whatever the three health watches report of them as a warning is a false alarm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stethoscope import Monitor
from stethoscope.watches import ActivationHealth, GradientHealth, ParameterHealth

CENTRES = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))


def batch(n=32):
    y = torch.randint(0, 10, (n,))
    return CENTRES[y] + 0.7 * torch.randn(n, 16), y


def mlp(activation=nn.ReLU, norm=None, inputs=16, width=64, depth=3, outputs=10):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else inputs, width), *([norm(width)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def warnings(model, optimizers, update, *, every, steps=300):
    watching = [ParameterHealth(), ActivationHealth(), GradientHealth()]
    with Monitor(model, optimizers, watches=watching, every=every, strict=True) as monitor:
        for step in range(steps):
            monitor.step(loss=update(step))
    return [str(finding) for finding in monitor.findings if finding.severity != "info"]


def plain(model, optimizer, loss=lambda model: F.cross_entropy(*swap(model)), clip=None, schedule=None):
    def update(step):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule:
            schedule.step()
        return value

    return update


def swap(model, dtype=torch.float32):
    x, y = batch()
    return model(x.to(dtype)).float(), y


class Lion(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.add_((0.9 * mean + 0.1 * p.grad).sign(), alpha=-group["lr"])
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)


class Adapted(nn.Module):
    """LoRA: a frozen layer and a product that begins at zero."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Branches(nn.Module):
    """Residual branches that begin at zero: by the last layer, by a scalar, by a BatchNorm."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner, self.head = kind, nn.Linear(16, 32), nn.Linear(32, 10)
        self.branches = nn.ModuleList(mlp(nn.ReLU, inputs=32, width=32, depth=1, outputs=32) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(32) if kind == "gamma" else nn.Identity() for _ in range(3))
        self.scale = nn.Parameter(torch.zeros(3) if kind == "scalar" else torch.ones(3))
        for branch, norm in zip(self.branches, self.norms, strict=True):
            nn.init.zeros_(norm.weight if kind == "gamma" else branch[-1].weight if kind == "last" else torch.empty(1))

    def forward(self, x):
        x = self.inner(x)
        for i, (branch, norm) in enumerate(zip(self.branches, self.norms, strict=True)):
            x = x + self.scale[i] * norm(branch(x))
        return self.head(x)


class Experts(nn.Module):
    """Two of eight experts are never chosen; they are not called, or called and weighed by zero."""

    def __init__(self, dense):
        super().__init__()
        self.dense, self.inner, self.router, self.head = dense, nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 10)
        self.experts = nn.ModuleList(mlp(inputs=32, width=32, depth=1, outputs=32) for _ in range(8))
        with torch.no_grad():
            self.router.bias[[3, 5]] = -50.0

    def forward(self, x):
        x = self.inner(x).relu()
        gate, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if self.dense:
                out = out + (mask * gate)[:, None] * expert(x)
            elif mask.any():
                out = out.index_put((mask,), gate[mask, None] * expert(x[mask]))
        return self.head(x + out)


class Language(nn.Module):
    """Tied embeddings, rare words, attention whose key biases have no gradient."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.words, self.places, self.checkpointed = nn.Embedding(200, 32), nn.Embedding(24, 32), checkpointed
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.01)
        layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True, norm_first=True, activation="gelu")
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 200, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(24)
        for layer in self.layers:
            x = (
                layer(x, mask)
                if self.checkpointed is None
                else checkpoint(layer, x, mask, use_reentrant=self.checkpointed)
            )
        return self.head(self.norm(x))


def next_words(model):
    rare = torch.multinomial(1 / torch.arange(1.0, 201), 8 * 25, replacement=True).view(8, 25)
    tokens = rare.clone()
    for i in range(24):
        tokens[:, i + 1] = torch.where(torch.rand(8) < 0.7, (tokens[:, i] * 3 + 1) % 200, rare[:, i + 1])
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def frozen(model):
    model[:-1].requires_grad_(False)
    return model


def adapted():
    model = mlp()
    return nn.Sequential(*(Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in model))


SGD = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4)  # noqa: E731 - a row of a table
ADAM = lambda p: torch.optim.AdamW(p, lr=1e-3)  # noqa: E731
CASES = {
    "relu, SGD": (mlp, SGD),
    "tanh and BatchNorm, SGD": (lambda: mlp(nn.Tanh, nn.BatchNorm1d), SGD),
    "GELU and LayerNorm, AdamW": (lambda: mlp(nn.GELU, nn.LayerNorm), ADAM),
    "sigmoid, AdamW": (lambda: mlp(nn.Sigmoid, depth=2), ADAM),
    "Adafactor": (lambda: mlp(norm=nn.LayerNorm), lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    "Lion": (lambda: mlp(norm=nn.LayerNorm), lambda p: Lion(p, lr=3e-4)),
    "fine-tuning at 5e-6": (lambda: mlp(norm=nn.LayerNorm), lambda p: torch.optim.AdamW(p, lr=5e-6)),
    "a frozen backbone": (lambda: frozen(mlp()), SGD),
    "a backbone that is left out of the optimizer": (lambda: frozen(mlp()), lambda p: SGD(list(p)[-2:])),
    "LoRA": (adapted, ADAM),
    "experts that are not called": (lambda: Experts(False), ADAM),
    "experts that are weighed by zero": (lambda: Experts(True), ADAM),
    **{
        f"a branch that begins at zero: {kind}": (lambda kind=kind: Branches(kind), ADAM)
        for kind in ("last", "scalar", "gamma")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, 25])
@pytest.mark.parametrize("name", CASES)
def test_classifiers_of_all_kinds(name, every):
    torch.manual_seed(0)
    make, optimize = CASES[name]
    model = make()
    optimizer = optimize(model.parameters())
    assert warnings(model, optimizer, plain(model, optimizer), every=every) == []


@pytest.mark.slow
@pytest.mark.parametrize("pure", [False, True])
def test_bfloat16(pure):
    torch.manual_seed(0)
    model = mlp(norm=nn.LayerNorm)
    dtype = torch.bfloat16 if pure else torch.float32
    model.to(dtype)
    optimizer = SGD(model.parameters())

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            return F.cross_entropy(*swap(model, dtype))

    assert warnings(model, optimizer, plain(model, optimizer, loss), every=10) == []


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_a_language_model_with_tied_weights_warm_up_and_checkpointing(checkpointed):
    torch.manual_seed(0)
    model = Language(checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    rate = lambda t: min(t / 50, 1) * 0.5 * (1 + math.cos(math.pi * t / 200))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    assert warnings(model, optimizer, plain(model, optimizer, next_words, 1.0, schedule), every=10, steps=200) == []


@pytest.mark.slow
@pytest.mark.parametrize(("first", "critics"), [("d", 1), ("g", 1), ("d", 5)])
def test_two_optimizers_that_share_gradients(first, critics):
    torch.manual_seed(0)
    both = nn.ModuleDict({"g": mlp(inputs=8, outputs=16), "d": mlp(nn.LeakyReLU, outputs=1)})
    og, od = (torch.optim.Adam(both[name].parameters(), lr=2e-4, betas=(0.5, 0.99)) for name in ("g", "d"))
    judge = F.binary_cross_entropy_with_logits

    def discriminate():
        od.zero_grad()
        real, fake = both["d"](batch()[0]), both["d"](both["g"](torch.randn(32, 8)).detach())
        (judge(real, torch.ones_like(real)) + judge(fake, torch.zeros_like(fake))).backward()
        od.step()

    def generate():
        og.zero_grad()
        fake = both["d"](both["g"](torch.randn(32, 8)))
        loss = judge(fake, torch.ones_like(fake))
        loss.backward()  # and leaves gradients in the discriminator
        og.step()
        return loss

    def update(step):
        if first == "d":
            discriminate()
        loss = generate() if step % critics == critics - 1 else torch.zeros(())
        if first == "g":
            discriminate()
        return loss

    assert warnings(both, [og, od], update, every=10) == []


@pytest.mark.slow
def test_a_moving_average_of_a_student():
    torch.manual_seed(0)
    student = mlp(norm=nn.BatchNorm1d, outputs=16)
    both = nn.ModuleDict(
        {
            "student": student,
            "teacher": copy.deepcopy(student).requires_grad_(False),
            "head": mlp(norm=nn.BatchNorm1d, outputs=16),
        }
    )
    optimizer = ADAM([p for p in both.parameters() if p.requires_grad])

    def update(step):
        x, _ = batch()
        with torch.no_grad():
            target = both["teacher"](x + 0.1 * torch.randn_like(x))
        loss = 2 - 2 * F.cosine_similarity(both["head"](both["student"](x)), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, now in zip(both["teacher"].parameters(), student.parameters(), strict=True):
                mean.lerp_(now, 0.01)
        return loss

    assert warnings(both, optimizer, update, every=10) == []


def test_gradient_accumulation_within_a_step():
    torch.manual_seed(0)
    model = mlp()
    optimizer = ADAM(model.parameters())

    def update(step):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(4):
            loss = F.cross_entropy(*swap(model)) / 4
            loss.backward()
        optimizer.step()
        return loss

    assert warnings(model, optimizer, update, every=5, steps=100) == []
