"""A graph network: gather, scatter, mean and softmax over neighbours; distances and angles of positions."""

import torch
from torch import nn
from torch.nn import functional as F

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class Mean(nn.Module):
    """Mean of the neighbours' messages."""

    def forward(self, messages, receiver, n):
        total = torch.zeros(n, messages.shape[1]).index_add(0, receiver, messages)
        count = torch.zeros(n).index_add(0, receiver, torch.ones(len(receiver)))
        return total / count[:, None]


class Symmetric(nn.Module):
    """Kipf and Welling's normalisation by the roots of both degrees."""

    def forward(self, messages, receiver, n):
        degree = torch.zeros(n).scatter_add_(0, receiver, torch.ones(len(receiver)))
        scale = degree.pow(-0.5)
        return torch.zeros(n, messages.shape[1]).index_add(0, receiver, messages) * scale[:, None]


class Attention(nn.Module):
    """Softmax over the messages of each receiver; who gets none keeps zero."""

    def forward(self, messages, receiver, n):
        score = messages.sum(-1)
        top = torch.full((n,), -inf).scatter_reduce(0, receiver, score, "amax")
        weight = torch.exp(score - top[receiver])
        total = torch.zeros(n).index_add(0, receiver, weight)
        return torch.zeros(n, messages.shape[1]).index_add(0, receiver, messages * (weight / total[receiver])[:, None])


class Layer(nn.Module):
    def __init__(self, width, gather):
        super().__init__()
        self.message, self.update = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.gather = gather

    def forward(self, nodes, edges):
        sender, receiver = edges
        messages = self.message(torch.cat([nodes[sender], nodes[receiver]], -1)).tanh()
        return nodes + self.update(self.gather(messages, receiver, len(nodes)))


class Graph(nn.Module):
    def __init__(self, gather, kinds=5, width=6):
        super().__init__()
        self.kinds = nn.Embedding(kinds, width)
        self.layers = nn.ModuleList(Layer(width, gather()) for _ in range(2))
        self.out = nn.Linear(width, 1)

    def forward(self, kind, edges):
        nodes = self.kinds(kind)
        for layer in self.layers:
            nodes = layer(nodes, edges)
        return self.out(nodes)


KIND = torch.tensor([0, 1, 2, 3, 1, 0])
RING = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
ISOLATED = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])  # nobody sends to node 5


def squares(out):
    return out.square().mean()


@fault("operation", "layers.0.gather", "div", "total / count", samples=(5,), call=0, first_inf="-")
def mean_over_no_neighbours():
    return Run(Graph(Mean), (KIND, ISOLATED), loss=squares)


@fault("operation", "layers.0.gather", "pow|mul", "degree.pow(-0.5)|* scale", first_inf="layers.0.gather")
def inverse_root_of_degree_zero():
    return Run(Graph(Symmetric), (KIND, ISOLATED), loss=squares)


@fault("parameter", "kinds", parameter="kinds.weight", samples=(3,), first_inf="-", first_nan="kinds")
def embedding_of_a_rare_kind_is_NaN():
    model = Graph(Attention)
    model.kinds.weight.data[3, 1] = nan
    return Run(model, (KIND, RING[:, :0]))


@fault("parameter", parameter="kinds.weight", samples=None, first_nan=None)
def embedding_that_no_node_of_today_reads_is_NaN():
    model = Graph(Attention)
    model.kinds.weight.data[4, 1] = nan
    return Run(model, (KIND, RING), loss=squares)


class Steps(nn.Module):
    """Molecules: positions give distances and angles."""

    def __init__(self, inner):
        super().__init__()
        self.mix = nn.Linear(3, 3, bias=False)
        self.inner = inner

    def forward(self, position):
        return self.inner(self.mix(position)).sum()


class Distance(nn.Module):
    def forward(self, position):
        apart = position[:, None] - position[None]
        return torch.exp(-apart.square().sum(-1).sqrt())


class Power(nn.Module):
    def forward(self, position):
        return position[0].clone().mul_(0).square().sum(-1, keepdim=True) ** 0.25


class Angle(nn.Module):
    def __init__(self, push=0.0):
        super().__init__()
        self.push = push

    def forward(self, position):
        unit = F.normalize(position, dim=-1)
        cosine = (unit * unit.roll(1, 0)).sum(-1).clamp(-1, 1) + self.push
        return torch.acos(cosine)


class Spectrum(nn.Module):
    def forward(self, position):
        return torch.linalg.eigh(position.t() @ position * 0 + torch.eye(3)).eigenvectors.square().sum(0)


class Careless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x / x.abs()


class Custom(nn.Module):
    def forward(self, position):
        return Careless.apply(position.round(decimals=0) * 0 + position * (position > 0))


def positions(n=4):
    return torch.randn(n, 3)


@fault("backward", "inner", "sqrt", ".sqrt())")
def distance_of_a_node_to_itself():
    return Run(Steps(Distance()), (positions(),), loss=lambda out: out)


@fault("backward", "inner", "pow", "** 0.25")
def fourth_root_of_zero():
    return Run(Steps(Power()), (positions(),), loss=lambda out: out)


@fault("operation", "inner", "acos", "torch.acos")
def angle_of_a_cosine_above_one():
    return Run(Steps(Angle(push=1e-4)), (positions()[:1].repeat(3, 1),), loss=lambda out: out)


@fault("backward", "inner", "acos", "torch.acos")
def slope_of_the_angle_between_parallel_vectors():
    model = Steps(Angle())
    model.mix.weight.data = torch.eye(3)
    return Run(model, (torch.tensor([[2.0, 0, 0], [1, 0, 0], [0, 1, 0]]),), loss=lambda out: out)


@fault("backward", "inner", "_linalg_eigh|linalg_eigh", "torch.linalg.eigh")
def eigenvectors_of_equal_eigenvalues():
    return Run(Steps(Spectrum()), (positions(),), loss=lambda out: out * 1.0)


@fault("backward", "inner", "", "Careless.apply|gradient * x / x.abs()")
def custom_function_that_divides_by_zero_in_backward():
    return Run(Steps(Custom()), (positions(),), loss=lambda out: out)


@healthy
def attention_with_an_isolated_node():
    return Run(Graph(Attention), (KIND, ISOLATED), loss=squares)


@healthy
def no_edges_at_all():
    return Run(Graph(Attention), (KIND, RING[:, :0]), loss=squares)


@healthy
def distances_by_cdist_with_zeros():
    class Pairs(nn.Module):
        def forward(self, position):
            return torch.cdist(position, position) + torch.linalg.vector_norm(position - position, dim=-1)

    return Run(Steps(Pairs()), (positions(),), loss=lambda out: out)


@healthy
def mean_over_neighbours_in_a_ring():
    return Run(Graph(Mean), (KIND, RING), loss=squares)


@healthy
def inverse_degree_with_zero_put_for_infinity():
    class Fixed(nn.Module):
        def forward(self, messages, receiver, n):
            degree = torch.zeros(n).scatter_add_(0, receiver, torch.ones(len(receiver)))
            scale = degree.pow(-0.5)
            scale[scale == inf] = 0
            return torch.zeros(n, messages.shape[1]).index_add(0, receiver, messages) * scale[:, None]

    return Run(Graph(Fixed), (KIND, ISOLATED), loss=squares)
