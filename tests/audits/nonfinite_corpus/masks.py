"""NaN and Inf on purpose, in the small network of `corners`: masks, missing values, start values; most of them are healthy."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ._case import Run, fault, healthy
from .corners import Net, Output, Step, run, squares, x

nan, inf = float("nan"), float("inf")


@fault("operation", "step", "full|full_like|fill", "torch.full_like", samples=None, first_inf="-")
def placeholder_of_NaN_that_is_not_overwritten_everywhere():
    def gather(x):
        y = torch.full_like(x, nan)
        y[:, :5] = x[:, :5]
        return y

    return run(gather)


@fault("operation", "step", "masked_fill", "x.masked_fill", first_inf="-")
def missing_values_marked_and_then_not_left_out():
    def mark(x):
        return x.masked_fill(x > 0.5, nan) - x.mean()

    return run(lambda x: mark(x + 1))


@fault("input", samples=(1,))
def missing_value_in_the_input_passes_a_mean():
    data = x()
    data[1, 2] = nan
    return Run(Net(Step(lambda x: x - x.mean(1, keepdim=True))), (data,), loss=squares)


@healthy
def mask_kept_in_a_buffer_that_grows():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.zeros(1, 1))

        def forward(self, x):
            if len(self.mask) < len(x):
                self.mask = torch.full((len(x), len(x)), -inf).triu(1)
            return (x @ x.t() + self.mask).softmax(-1) @ x

    return run(Causal())


@fault("operation|loss", "step|", "log|_softmax", "weight.log()|softmax(-1)")
def every_weight_of_a_row_is_zero_before_its_logarithm():
    def attend(x):
        weight = torch.ones(4, 6)
        weight[2] = 0
        return (x + weight.log()).softmax(-1)

    return run(attend)


@fault("loss|operation", None, "nll_loss_forward|masked_fill", "F.cross_entropy|x.masked_fill")
def target_is_a_class_that_is_masked():
    class Masked(Net):
        def forward(self, x):
            x = super().forward(x)
            return x.masked_fill(torch.tensor([False, True]), -inf)

    return Run(Masked(nn.ReLU()), (x(),), loss=lambda out: F.cross_entropy(out, torch.tensor([0, 0, 1, 0])))


@healthy
def dataclass_with_infinity_on_the_diagonal():
    class Structured(Net):
        def forward(self, x):
            distance = torch.cdist(x, x).masked_fill(torch.eye(len(x), dtype=torch.bool), inf)
            return Output(super().forward(x), distance)

    return Run(Structured(nn.ReLU()), (x(),), loss=lambda out: squares(out.logits))


@healthy
def missing_values_left_out_by_nanmean():
    class Impute(Net):
        def forward(self, x):
            return super().forward(torch.where(x.isnan(), x.nanmean(0), x))

    data = x()
    data[1, 2] = nan
    return Run(Impute(nn.ReLU()), (data,), loss=squares)


@healthy
def logarithm_of_a_mask_added_to_scores():
    def attend(x):
        weight = (torch.arange(6) < 4).float()
        return (x + weight.log()).softmax(-1)

    return run(attend)


@healthy
def cross_entropy_over_masked_classes():
    class Masked(Net):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, True]), -inf)

    return Run(Masked(nn.ReLU()), (x(),), loss=lambda out: F.cross_entropy(out, torch.zeros(4, dtype=torch.long)))


@healthy
def uninitialised_memory_that_is_overwritten():
    def fill(x):
        y = torch.empty_like(x).fill_(nan)
        y.copy_(x)
        return y

    return run(fill)


@healthy
def running_maximum_from_minus_infinity():
    def largest(x):
        best = torch.full((len(x),), -inf)
        for column in x.unbind(1):
            best = torch.maximum(best, column)
        return x - best[:, None]

    return run(largest)


@healthy
def streaming_softmax():
    """As flash attention does it: maximum, scale and sum per block, from minus infinity and zero."""

    def attend(x):
        top, total = torch.full((len(x), 1), -inf), torch.zeros(len(x), 1)
        for block in x.split(2, 1):
            new = torch.maximum(top, block.amax(1, keepdim=True))
            total = total * (top - new).exp() + (block - new).exp().sum(1, keepdim=True)
            top = new
        return (x - top).exp() / total

    return run(attend)


@healthy
def beam_scores_start_at_minus_infinity():
    def beams(x):
        score = torch.tensor([0.0, -inf, -inf])
        for column in x.unbind(1):
            grown = (score[None, :, None] + column[:, None, None].expand(-1, 3, 2).log_softmax(-1)).flatten(1)
            score = grown.topk(3, 1).values[0]
        return x + score[:1]

    return run(beams)


@healthy
def loss_that_is_recomputed_where_it_is_not_finite():
    def loss(out):
        risky = (out - out.detach()).abs().detach().log()
        return torch.where(risky.isfinite(), risky, out.square()).mean()

    return run(torch.relu, loss=loss)


@healthy
def quantile_padding_and_sorting_with_infinity():
    def middle(x):
        padded = torch.cat([x, torch.full((len(x), 2), inf)], 1)
        return padded.sort(1).values[:, :6]

    return run(middle)
