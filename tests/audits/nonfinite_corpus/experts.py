"""A mixture of experts: a router with top-k gates, capacity, balance loss and noise; experts that may get no token."""

import torch
from torch import nn

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class Router(nn.Module):
    """Gates of the two likeliest experts. What is closed (`open` is 0) gets minus infinity first."""

    def __init__(self, width, experts, renormalise=False):
        super().__init__()
        self.score = nn.Linear(width, experts)
        self.renormalise = renormalise

    def forward(self, x, allowed):
        logits = self.score(x).masked_fill(~allowed, -inf)
        if self.renormalise:
            gates = logits.sigmoid()
            top = gates.topk(2)
            return top.values / top.values.sum(-1, keepdim=True), top.indices, gates
        gates = logits.softmax(-1)
        top = gates.topk(2)
        return top.values, top.indices, gates


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, width=6, experts=4, renormalise=False, statistics=False):
        super().__init__()
        self.router = Router(width, experts, renormalise)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))
        self.register_buffer("level", torch.zeros(experts))
        self.statistics = statistics

    def forward(self, x, allowed=None):
        allowed = torch.ones(len(x), len(self.experts), dtype=torch.bool) if allowed is None else allowed
        values, chosen, gates = self.router(x, allowed)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            item, slot = torch.where(chosen == i)
            y = expert(x[item])
            if self.statistics:
                self.level[i] = y.detach().abs().mean()
            out.index_add_(0, item, y * values[item, slot, None])
        return {"out": x + out, "gates": gates, "logits": self.router.score(x)}


def x(n=6):
    return torch.randn(n, 6)


def first_two(n=6):
    allowed = torch.zeros(n, 4, dtype=torch.bool)
    allowed[:, :2] = True
    return allowed


def squares(out):
    return out["out"].square().mean()


@fault("operation", "router", "div", "top.values / top.values.sum", samples=(4,), first_inf="-", first_nan="router")
def token_with_every_expert_closed_is_renormalised():
    allowed = torch.ones(6, 4, dtype=torch.bool)
    allowed[4] = False
    return Run(Mixture(renormalise=True), (x(), allowed), loss=squares)


@fault("operation", "router", "_softmax", "logits.softmax(-1)", samples=(2,), first_inf="-", first_nan="router")
def softmax_over_closed_experts():
    allowed = torch.ones(6, 4, dtype=torch.bool)
    allowed[2] = False
    return Run(Mixture(), (x(), allowed), loss=squares)


@fault("loss", "", "log", "gates.log()")
def balance_loss_takes_the_logarithm_of_a_closed_gate():
    def loss(out):
        gates = out["gates"]
        return squares(out) + (gates * gates.log()).sum(-1).mean()

    return Run(Mixture(), (x(), first_two()), loss=loss)


@fault("parameter", "experts.1.up", parameter="experts.1.up.weight", first_inf="-", first_nan="experts.1.up")
def weight_of_an_expert_is_NaN():
    model = Mixture()
    model.experts[1].up.weight.data[0, 0] = nan
    return Run(model, (x(), first_two()), loss=squares)


@fault("parameter", parameter="experts.3.down.bias")
def weight_of_an_expert_without_tokens_is_infinite():
    model = Mixture()
    model.experts[3].down.bias.data[2] = inf
    return Run(model, (x(), first_two()), loss=squares)


@fault("operation", "", "mean", "y.detach().abs().mean()")
def statistic_of_an_expert_without_tokens():
    return Run(Mixture(statistics=True), (x(), first_two()), loss=squares)


@fault("loss", "", "exp", 'out["logits"].exp()')
def z_loss_by_hand_overflows():
    model = Mixture()
    model.router.score.bias.data[1] = 100
    return Run(model, (x(),), loss=lambda out: squares(out) + out["logits"].exp().sum(-1).log().square().mean())


class Gumbel(Router):
    def forward(self, x, allowed):
        uniform = torch.rand(len(x), 4)
        uniform[3, 1] = 0  # a generator in half precision does give zeros
        logits = self.score(x) - torch.log(-torch.log(uniform))
        return super().forward(x - x.detach() + logits.detach().mean() * 0 + x.detach(), allowed)


@fault("operation", "router", "log", "torch.log(-torch.log(uniform))", first_inf="router")
def gumbel_noise_of_an_exact_zero():
    model = Mixture()
    model.router = Gumbel(6, 4)
    return Run(model, (x(),), loss=squares)


@fault("parameter", "router.score", parameter="router.score.weight")
def bit_flip_in_the_router():
    model = Mixture()
    weight = model.router.score.weight.data.view(-1)
    weight[4] = 0.3
    weight.view(torch.int32)[4] ^= 1 << 30
    return Run(model, (x() * 20,), loss=squares)


@healthy
def closed_experts_and_experts_without_tokens():
    return Run(Mixture(), (x(), first_two()), loss=squares)


@healthy
def entropy_of_gates_with_zeros_by_xlogy():
    def loss(out):
        gates = out["gates"]
        return squares(out) + torch.special.entr(gates.detach()).sum(-1).mean()

    return Run(Mixture(), (x(), first_two()), loss=loss)


@healthy
def z_loss_by_logsumexp():
    model = Mixture()
    model.router.score.bias.data[1] = 100
    return Run(model, (x(),), loss=lambda out: squares(out) + out["logits"].logsumexp(-1).square().mean())


@healthy
def tokens_with_every_expert_closed_are_left_out():
    allowed = torch.ones(6, 4, dtype=torch.bool)
    allowed[4] = False

    class Kept(Mixture):
        def forward(self, x, allowed):
            with torch.no_grad():
                whole = super().forward(x, allowed)["out"]
            keep = allowed.any(1)
            return {"out": torch.where(keep[:, None], whole, x)}

    return Run(Kept(renormalise=True), (x(), allowed))


@healthy
def no_token_at_all():
    return Run(Mixture(), (x(0),), loss=lambda out: out["out"].sum())
