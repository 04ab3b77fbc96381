"""A transformer language model: tied embeddings, RMSNorm, masked softmax, a shared block, checkpointing, autocast."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")
PAD = 0


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        rms = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return x / rms * self.gain


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, *, x, mask):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * self.scale
        scores = scores.masked_fill(mask, -inf)
        weights = scores.softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.norm, self.attention = RMSNorm(width, eps), Attention(width)
        self.ff = nn.Sequential(
            RMSNorm(width, eps), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, mask):
        x = x + self.attention(x=self.norm(x), mask=mask)
        return x + self.ff(x)


class LM(nn.Module):
    """Called by keywords only; `repeats` calls of one shared block follow the others."""

    def __init__(self, words=20, width=8, eps=1e-6, recompute=False, temperature=1.0):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=PAD)
        self.blocks = nn.ModuleList(Block(width, eps) for _ in range(2))
        self.shared = Block(width, eps)
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.recompute = recompute

    def forward(self, *, tokens, mask=None, bias=None):
        x = self.embed(tokens)
        if bias is not None:
            x = x + bias
        mask = causal(tokens) if mask is None else mask
        for block in [*self.blocks, self.shared, self.shared]:
            x = checkpoint(block, x, mask, use_reentrant=False) if self.recompute else block(x, mask)
        return {"logits": self.head(self.norm(x)) / self.temperature, "hidden": x}


def tokens(n=3, length=6):
    return torch.randint(1, 20, (n, length))


def causal(words):
    length = words.shape[1]
    return torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]


def next_word(words):
    return lambda out: F.cross_entropy(out["logits"][:, :-1].flatten(0, 1).float(), words[:, 1:].flatten())


@fault("operation", "blocks.0.attention", "_softmax", "scores.softmax(-1)", samples=(1,), first_inf="-")
def one_item_that_is_padding_only():
    words = tokens()
    mask = causal(words).expand(3, 1, 6, 6).clone()
    mask[1] = True
    return Run(LM(), kwargs={"tokens": words, "mask": mask}, loss=next_word(words))


@fault("parameter", "embed", parameter="embed.weight", first_inf="-", first_nan="head")
def tied_weight_is_NaN_for_a_word_that_does_not_occur():
    model, words = LM().eval(), tokens().clamp(max=10)
    model.embed.weight.data[15, 3] = nan
    return Run(model, kwargs={"tokens": words})


@fault("operation", "blocks.0.norm", "div", "x / rms", samples=(2,), first_inf="-", first_nan="blocks.0.norm")
def padding_through_a_norm_without_eps():
    model, words = LM(eps=0.0), tokens()
    words[2, 4:] = PAD
    return Run(model, kwargs={"tokens": words}, loss=next_word(words))


class Doubling(nn.Module):
    """Squares at each call: 20, 400, and then beyond half precision."""

    def __init__(self):
        super().__init__()
        self.square = Squared()

    def forward(self, x):
        for _ in range(3):
            x = self.square(x)
        return x


class Squared(nn.Module):
    def forward(self, x):
        return x * x


@fault("operation", "square", "mul", "x * x", samples=(1,), call=1, first_inf="square", first_nan="-")
def second_call_of_a_shared_module_overflows():
    x = torch.ones(2, 4, dtype=torch.float16)
    x[1, 2] = 20
    return Run(Doubling(), (x,))


class SafeLooking(Block):
    def forward(self, x, mask):
        x = super().forward(x, mask)
        energy = x.relu().sum(-1, keepdim=True) * 0
        return x + torch.where(energy > 0, energy.sqrt(), 0)


@fault("backward", "blocks.1", "sqrt", "energy.sqrt()")
def where_hides_a_root_inside_of_a_recomputed_block():
    model, words = LM(recompute=True), tokens()
    model.blocks[1] = SafeLooking(8)
    return Run(model, kwargs={"tokens": words}, loss=next_word(words))


@fault("operation", "blocks.0.attention", "mul|bmm|matmul", "q @ k", first_inf="blocks.0.attention")
def attention_scores_overflow_under_autocast():
    model, words = LM(), tokens()
    model.blocks[0].attention.qkv.weight.data.mul_(2000)
    return Run(
        model,
        kwargs={"tokens": words},
        loss=next_word(words),
        context=lambda: torch.autocast("cpu", torch.float16),
    )


@fault("operation", "blocks.1.ff.1", "_to_copy", first_inf="blocks.1.ff.1")
def weight_too_large_for_the_cast_of_autocast():
    model, words = LM(), tokens()
    model.blocks[1].ff[1].weight.data[3, 4] = 1e5
    model.blocks[1].ff[1].weight.data[:3] *= 100
    return Run(model, kwargs={"tokens": words}, context=lambda: torch.autocast("cpu", torch.float16))


@fault("input", samples=(2,), first_inf="-")
def NaN_in_an_input_that_is_given_by_keyword():
    bias = torch.randn(3, 6, 8)
    bias[2, 5, 0] = nan
    return Run(LM().eval(), kwargs={"tokens": tokens(), "bias": bias})


@fault("loss", "", "nll_loss_forward|nll_loss2d_forward|div", "ignore_index=PAD", first_inf="-")
def every_target_is_ignored():
    words = tokens()
    targets = torch.full((3, 6), PAD)
    return Run(
        LM(),
        kwargs={"tokens": words},
        loss=lambda out: F.cross_entropy(out["logits"].flatten(0, 1), targets.flatten(), ignore_index=PAD),
    )


@fault("operation", "", "div", "/ self.temperature")
def temperature_annealed_to_zero():
    return Run(LM(temperature=0.0), kwargs={"tokens": tokens()})


@fault("parameter", "", parameter="temperature", first_inf="-", first_nan="")
def parameter_of_the_root_is_NaN():
    words = tokens()
    return Run(LM(temperature=nan), kwargs={"tokens": words}, loss=next_word(words))


@healthy
def causal_mask():
    words = tokens()
    return Run(LM(recompute=True), kwargs={"tokens": words}, loss=next_word(words))


@healthy
def autocast_in_bfloat16():
    words = tokens()
    return Run(
        LM(),
        kwargs={"tokens": words},
        loss=next_word(words),
        context=lambda: torch.autocast("cpu", torch.bfloat16),
    )


class Relative(nn.Module):
    """Relative positions in logarithmic buckets: log(0) for the first, which is never used."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        ahead = torch.arange(x.shape[1])
        distance = (ahead[None] - ahead[:, None]).abs()
        large = 4 + (torch.log(distance.float() / 4) / math.log(4) * 4).to(torch.long)
        bucket = torch.where(distance < 4, distance, large.clamp(max=7))
        bias = self.bias(bucket).permute(2, 0, 1)
        future = torch.full(distance.shape, -inf).triu(1)
        return self.attention(x, x, x, attn_mask=(bias + future).repeat(len(x), 1, 1), need_weights=False)[0]


@healthy
def logarithmic_buckets_and_an_additive_mask():
    return Run(Relative(), (torch.randn(2, 7, 8),), loss=lambda out: out.square().mean())


class Filtered(LM):
    """Keeps the likeliest words, as before sampling."""

    def forward(self, *, tokens):
        logits = super().forward(tokens=tokens)["logits"]
        least = logits.topk(3).values[..., -1:]
        return logits.masked_fill(logits < least, -inf)


@healthy
def unlikely_words_are_minus_infinity_in_the_output():
    return Run(Filtered().eval(), kwargs={"tokens": tokens()})


class Cleaned(Attention):
    """Rows that are masked whole become zero on purpose."""

    def forward(self, *, x, mask):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2)).masked_fill(mask[:, 0], -inf).softmax(-1).nan_to_num(0.0)
        return self.out(weights @ v)


@healthy
def padding_rows_of_the_softmax_are_cleaned():
    model, words = LM(), tokens()
    for block in [*model.blocks, model.shared]:
        block.attention = Cleaned(8)
    mask = causal(words).expand(3, 1, 6, 6).clone()
    mask[1, :, 4:] = True
    return Run(model, kwargs={"tokens": words, "mask": mask})


@healthy
def some_targets_are_ignored():
    words = tokens()
    words[1, 3:] = PAD
    return Run(
        LM(),
        kwargs={"tokens": words},
        loss=lambda out: F.cross_entropy(out["logits"].flatten(0, 1), words.flatten(), ignore_index=PAD),
    )
