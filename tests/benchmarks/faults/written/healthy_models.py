"""Programs beyond those with faults: two optimizers against each other, experts of which some rest, adapters on a frozen network."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder, classifier, language
from faults._training import Batch, Observer, Tensors, Training, seeded


class Adversaries(nn.Module):
    """A generator of points on a ring and its critic."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 2))  # fmt: skip
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))  # fmt: skip

    def forward(self, noise):
        fake = self.generator(noise)
        return fake, self.critic(fake)


def gan() -> Training:
    torch.manual_seed(0)
    model = Adversaries()

    def sample(step: int, phase: str) -> Batch:
        made = seeded(step, len(phase))
        angle = 6.2832 * torch.rand(64, 1, generator=made)
        ring = torch.cat([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(64, 2, generator=made)
        return torch.randn(64, 4, generator=made), ring

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        fake, score = model(batch[0])
        return {"loss": F.softplus(-score).mean(), "outputs": fake}

    def update(t: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = t.sample(step, "train")
        first, second = t.optimizers
        critic_loss = F.softplus(t.model.critic(t.model.generator(batch[0]).detach())).mean()
        critic_loss = critic_loss + F.softplus(-t.model.critic(batch[1])).mean()
        second.zero_grad()
        critic_loss.backward()
        second.step()
        tensors = t.forward(t.model, batch)
        first.zero_grad()
        tensors["loss"].backward()
        observer.backward_done(t, step)
        first.step()
        return batch, {**tensors, "critic_loss": critic_loss}

    training = Training(model, sample, forward, lambda tensors, batch: {"radius": float(tensors["outputs"].norm(dim=1).mean())}, torch.optim.Adam, update=update)  # fmt: skip
    training.optimizers = [
        torch.optim.Adam(model.generator.parameters(), 1e-3, betas=(0.5, 0.9)),
        torch.optim.Adam(model.critic.parameters(), 1e-3, betas=(0.5, 0.9)),
    ]
    return training


class Experts(nn.Module):
    """Six feed-forward experts, the best for each token; the last two are kept in reserve and never chosen."""

    def __init__(self, width: int = language.WIDTH) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(6))  # fmt: skip

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        best, chosen = shares.max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                out[rows] = best[rows][:, None] * expert(x[rows])
        return out


def mixture_of_experts() -> Training:
    t = language.build()
    for block in t.model.blocks:
        block.mlp = Experts()
    return t


class Adapted(nn.Module):
    """A frozen linear layer and a trained difference of low rank. Source: Hu et al. 2021 (LoRA), arXiv:2106.09685."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


def adapters() -> Training:
    t = language.build()
    t.model.requires_grad_(False)
    for block in t.model.blocks:
        block.attention.qkv, block.attention.out = Adapted(block.attention.qkv), Adapted(block.attention.out)
        block.mlp[0], block.mlp[2] = Adapted(block.mlp[0]), Adapted(block.mlp[2])
    t.model.norm.requires_grad_(True)
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-2)
    return t


def fine_tuned() -> Training:
    """A backbone that was trained before and is frozen, in eval mode; the head is new."""
    t = classifier.build()
    pretrained = classifier.build(seed=0)
    optimizer = torch.optim.Adam(pretrained.model.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        pretrained.forward(pretrained.model, pretrained.sample(step, "train"))["loss"].backward()
        optimizer.step()
    for name in ("block1", "block2", "block3"):
        block = getattr(t.model, name)
        block.load_state_dict(getattr(pretrained.model, name).state_dict())
        block.requires_grad_(False)
        t.before.append(lambda training, step, block=block: block.eval())
    return t


def variational() -> Training:
    """A variational autoencoder: noise on the code, a divergence in the loss."""
    t = autoencoder.build()
    t.model.encoder = autoencoder.mlp((autoencoder.WIDTH, 32, 16, 2 * autoencoder.LATENT), nn.Tanh)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        mean, log_variance = model.encoder(batch[0]).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        outputs = model.decoder(code)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        loss = F.mse_loss(outputs, batch[0]) + 0.01 * divergence
        return {"loss": loss, "outputs": outputs, "targets": batch[0], "divergence": divergence}

    t.forward = forward
    return t


class Lion(torch.optim.Optimizer):
    """Sign of a running mean. Source: Chen et al. 2023, arXiv:2302.06675."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    p.add_((0.9 * mean + 0.1 * p.grad).sign(), alpha=-group["lr"])
                    mean.mul_(0.99).add_(p.grad, alpha=0.01)
