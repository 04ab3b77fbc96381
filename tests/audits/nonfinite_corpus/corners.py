"""A small network with one unusual step in its middle: corners of PyTorch that models really use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class Net(nn.Module):
    def __init__(self, step: nn.Module):
        super().__init__()
        self.inp, self.step, self.out = nn.Linear(4, 6), step, nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.step(self.inp(x).tanh()))


class Step(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def x(n=4):
    return torch.randn(n, 4)


def squares(out):
    return out.square().mean()


def run(function, n=4, loss=squares, **kwargs):
    step = function if isinstance(function, nn.Module) else Step(function)
    return Run(Net(step), (x(n),), kwargs, loss=loss)


@fault("operation", "step", "", "np.log|torch.from_numpy", first_inf="-")
def logarithm_by_numpy():
    def log(x):
        with np.errstate(all="ignore"):
            y = np.log(x.detach().numpy())
        return torch.from_numpy(y) * 1.0

    return run(log, loss=None)


@fault("operation", "step", "sqrt", "x.sqrt()", first_inf="-", first_nan="step")
def model_raises_since_it_checks_for_NaN_itself():
    def check(x):
        y = x.sqrt()
        if y.isnan().any():
            raise ValueError("NaN!")
        return y

    return run(check)


@fault("operation", "step", "log", "x.log()", first_nan="step")
def distribution_refuses_a_NaN():
    def sample(x):
        scale = x.log()
        return torch.distributions.Normal(scale, 1.0).rsample()

    return run(sample)


@fault("operation", "step", "div", "out=y")
def result_written_to_a_given_tensor():
    def divide(x):
        y = torch.empty_like(x)
        with torch.no_grad():
            torch.div(x, (x > 2).float(), out=y)
        return y

    return run(divide, loss=None)


@fault("operation", "step", "_to_copy", "torch.float8_e5m2")
def float8_overflows():
    return run(lambda x: (x * 1e7).to(torch.float8_e5m2).float(), loss=None)


@fault("operation", "step", "log", "x.abs().log() * (x > 9)")
def logarithm_under_vmap():
    def inner(x):
        return (x - x).abs().log() + x.abs().log() * (x > 9)

    return run(torch.func.vmap(inner), loss=None)


@fault("backward", "", "sqrt|pow", ".sum(1).sqrt()")
def gradient_penalty_of_a_dead_critic():
    model = Net(Step(torch.relu))
    model.inp.bias.data[:] = -100
    data = x().requires_grad_()

    def loss(out):
        (slope,) = torch.autograd.grad(out.sum(), data, create_graph=True)
        return ((slope.square().sum(1).sqrt() - 1) ** 2).mean()

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, _):
            return self.net(data)

    return Run(Critic(), (x(),), loss=loss)


@fault("backward", "step", "sqrt", "y.sqrt()")
def root_under_reentrant_checkpointing():
    class Again(nn.Module):
        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

        def inner(self, x):
            y = (x * 0).square()
            return x + y.sqrt()

    return run(Again())


@fault("backward", "step", "div", "x / y")
def where_hides_a_division():
    def ratio(x):
        y = F.hardshrink(x, 0.5)
        return torch.where(y != 0, x / y, 0.0)

    return run(ratio)


@healthy
def angle_of_the_zero_vector_whose_slope_torch_sets_to_zero():
    return run(lambda x: x + torch.atan2(x * 0, x * 0))


class InnerLoop(nn.Module):
    """One step of gradient descent inside of the forward pass, on a loss whose slope is infinite where it is."""

    def __init__(self, gradient):
        super().__init__()
        self.inner, self.gradient = nn.Linear(6, 6), gradient

    def forward(self, x):
        def loss(weight):
            return ((x @ weight.t()) * 0).square().sum().sqrt()

        return x @ (self.inner.weight - self.gradient(loss, self.inner.weight)).t()


@fault("operation", "step", "sqrt", ".sum().sqrt()")
def slope_in_an_inner_loop_of_autograd():
    return run(InnerLoop(lambda loss, weight: torch.autograd.grad(loss(weight), weight, create_graph=True)[0]))


@fault("operation", "step", "sqrt", ".sum().sqrt()")
def slope_in_an_inner_loop_of_functional_transforms():
    return run(InnerLoop(lambda loss, weight: torch.func.grad(loss)(weight)), loss=None)


@fault("operation", "step", "div", "x.sum(0) / self.count")
def average_of_nothing_written_to_a_buffer():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            with torch.no_grad():
                self.mean.copy_(x.sum(0) / self.count)
            return x

    return run(Average())


@fault("operation", "step", "div", "teacher / teacher.norm()")
def teacher_whose_weights_are_written_in_the_forward_pass():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(requires_grad=False)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
                teacher = self.teacher.weight * 0  # a decay that starts at zero
                self.teacher.weight.copy_(teacher / teacher.norm())
            return self.student(x) - target

    return run(Distilled())


@fault("backward", "", "div", "gradient / gradient.abs().max()")
def hook_that_scales_a_gradient_by_its_maximum():
    model = Net(nn.ReLU())
    model.inp.bias.data[:] = -100
    model.inp.weight.register_hook(lambda gradient: gradient / gradient.abs().max())
    return Run(model, (x(),), loss=lambda out: (out * 0).mean())


@fault("parameter", "step.scales", parameter="step.scales.1", first_inf="-")
def entry_of_a_parameter_list_is_NaN():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList(torch.ones(6) for _ in range(3))

        def forward(self, x):
            return sum(x * scale for scale in self.scales)

    step = Scaled()
    step.scales[1].data[4] = nan
    return run(step)


@fault("operation", "step", "div", "x / x.sum(1, keepdim=True)", samples=None, first_inf="-")
def dropout_that_happens_to_drop_a_whole_row():
    def drop(x):
        x = F.dropout(x.exp()[:, :2], 0.7)
        return (x / x.sum(1, keepdim=True)).repeat(1, 3)

    return run(drop, n=16)


@fault("buffer", "step", first_inf="-", parameter="step.state|step.state.0|step.state[0]")
def hidden_state_kept_in_a_tuple_is_NaN():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(6, 6)
            self.state = torch.zeros(4, 6), torch.zeros(4, 6)

        def forward(self, x):
            hidden, cell = self.cell(x, self.state)
            self.state = hidden.detach(), cell.detach()
            return hidden

    step = Recurrent()
    step.state[0][2, 2] = nan
    return run(step)


@fault("operation", "step", "mul", "x * self.scale")
def number_of_python_is_infinite():
    class Scaled(nn.Module):
        scale = inf

        def forward(self, x):
            return x * self.scale

    return run(Scaled())


@fault("loss", "", "mean", "out.mean()", first_inf="-")
def mean_of_an_empty_batch():
    return run(torch.relu, n=0, loss=lambda out: out.mean())


@fault("operation", "step", "log", "(x * 0).log()")
def hook_of_the_user_takes_a_logarithm():
    model = Net(nn.Sigmoid())
    model.step.register_forward_hook(lambda module, args, x: (x * 0).log())
    return Run(model, (x(),), loss=squares)


@fault("loss", "", "nll_loss_forward", "weight=")
def every_target_has_weight_zero():
    return run(
        torch.relu,
        loss=lambda out: F.cross_entropy(out, torch.zeros(4, dtype=torch.long), weight=torch.tensor([0.0, 1])),
    )


@torch.library.custom_op("corpus::level", mutates_args=())
def level(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1).log()


@fault("operation", "step", "corpus.level", "level(x - x)|x.sum(1).log()")
def operator_of_an_extension():
    return run(lambda x: x + level(x - x)[:, None], loss=None)


@fault("buffer", "step", parameter="step.adjacency", first_inf="-")
def sparse_buffer_holds_a_NaN():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            values = torch.tensor([1.0, nan, 1.0])
            self.register_buffer(
                "adjacency", torch.sparse_coo_tensor([[0, 1, 3], [1, 2, 0]], values, (4, 4)).coalesce()
            )

        def forward(self, x):
            return torch.sparse.mm(self.adjacency, x)

    return run(Spread())


@dataclass
class Output:
    logits: torch.Tensor
    distance: torch.Tensor


@fault("operation", "", "log", "x.log()", samples=None)
def dataclass_returned_by_the_model():
    class Structured(Net):
        def forward(self, x):
            return Output(super().forward(x), x.log())

    return Run(Structured(nn.ReLU()), (x(),), loss=None)


@healthy
def similarity_of_zero_vectors():
    return run(lambda x: x * F.cosine_similarity(x * 0, x, dim=1)[:, None] + F.normalize(x * 0))


@healthy
def float8_within_its_range():
    return run(lambda x: (x * 10).to(torch.float8_e4m3fn).float(), loss=None)
