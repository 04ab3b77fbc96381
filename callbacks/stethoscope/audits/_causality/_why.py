"""Says why a module looks ahead and what to change, from its type and settings, else from what was measured."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Reason(NamedTuple):
    """Why, and what to change."""

    why: str
    advice: str


_MIXES_ITEMS = Reason(
    "mixes the items of the batch",
    "Give every mean, maximum and std() its dim=, and look for reshapes that mix the batch with another axis.",
)
_BATCH_NORM = Reason(
    "normalises with the statistics of the batch, over all steps and all items",
    "Use a cumulative or per-step norm (LayerNorm or RMSNorm over channels, cLN); or keep BatchNorm in eval mode while training and judge modes=('eval',).",
)
_NORM = Reason(
    "normalises with statistics over the whole of time",
    "Use a norm whose statistics end at the current step: LayerNorm or RMSNorm over channels, or a cumulative norm (cLN).",
)
_BOTH_WAYS = Reason("is bidirectional: its backward direction starts at the last step", "Set bidirectional=False.")
_PADDING = Reason(
    "pads on both sides, so that its kernel reaches ahead",
    "Pad (kernel_size - 1) * dilation steps on the left only (F.pad(x, (p, 0))) and set padding=0.",
)
_KERNEL = Reason(
    "its kernel reaches ahead of the step that its output stands for",
    "Pad (kernel_size - 1) * dilation steps on the left only, or declare the window as allowed=.",
)
_ATTENTION = Reason(
    "attends to later steps",
    "Pass a causal mask (is_causal=True with attn_mask, or F.scaled_dot_product_attention(..., is_causal=True)).",
)
_POOL = Reason("pools over steps to come", "Pool over past steps only: pad on the left, then pool without padding.")
_RESIZE = Reason(
    "interpolates between the current and the next step", "Use mode='nearest', or delay the input by one step."
)
_TRANSPOSED = Reason(
    "spreads each step over earlier ones: its output is trimmed at the start",
    "Set padding=0 and trim the output at its end only.",
)


def reason(module: nn.Module | None, *, whole: bool, ahead: int, statistic: str = "", batch: bool = False) -> Reason:
    """Explain one culprit.

    Args:
        module: the culprit, None for a function.
        whole: whether it looks ahead over everything.
        ahead: by how many input steps.
        statistic: the line that computes one number from all of time, where one was seen.
        batch: explain a leak across the batch instead.
    """
    by_type = _by_type(module) if module is not None else None
    if batch:
        return _BATCH_NORM if by_type is _BATCH_NORM else _MIXES_ITEMS
    if by_type is not None:
        return by_type
    name = type(module).__name__.lower() if module is not None else ""
    if statistic:
        return Reason(
            f"uses statistics of the whole clip ({statistic})",
            "Compute them from past steps only (running or cumulative statistics), or once, outside of the model.",
        )
    if whole and any(part in name for part in ("norm", "ln", "whiten")):
        return _NORM
    if whole and any(part in name for part in ("attention", "attn", "transformer", "conformer")):
        return _ATTENTION
    if whole:
        return Reason(
            "depends on the whole input: statistics of the clip, attention without a mask, or a backward direction",
            "Compute each output step from inputs up to that step only.",
        )
    return Reason(
        f"reads {ahead} steps ahead: padding on both sides, a shift, a block, or a backward direction that soon forgets",
        "Pad on the left only, run recurrent layers forward only, or declare the latency: allowed=.",
    )


def _by_type(module: nn.Module) -> Reason | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  # the public base of all BatchNorms
        return _BATCH_NORM
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)):  # noqa: SLF001
        return _NORM
    if isinstance(module, nn.RNNBase):
        return _BOTH_WAYS if module.bidirectional else None
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return _TRANSPOSED
    if isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001
        padded = module.padding == "same" or any(size != 0 for size in module.padding if isinstance(size, int))
        return _PADDING if padded else _KERNEL
    if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)):
        return _ATTENTION
    if isinstance(module, (nn.Upsample,)):
        return _RESIZE
    if "Pool" in type(module).__name__ and type(module).__module__.startswith("torch.nn"):
        return _POOL
    return None
