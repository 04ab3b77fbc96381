"""Is a batch of a separation training what the loss takes it for?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stethoscope import separation_stats as stats
from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

ALIKE = 0.98  # |cos| of a reference with the mixture: 14 dB SI-SDR before anything is separated
SUM = 0.5  # |cos| of the mixture with the sum of its references; noise as loud as the speech leaves 0.7


def of_batch(batch: tuple[Tensor, Tensor] | None, loss: object) -> tuple[list[Finding], float | None]:
    """Check `(mixture, references)` and the loss on them.

    Returns:
        Findings, and the loss of perfect estimates where `loss` is a function.

    Raises:
        ValueError: the batch is not two tensors with a common batch size and time axis.
    """
    if batch is None:
        return [], None
    if len(batch) != 2 or not all(isinstance(each, Tensor) for each in batch):
        raise ValueError("batch must be (mixture, references), two tensors of shapes (B, T) and (B, S, T).")
    mixture, references = batch
    if mixture.dim() == 3 and mixture.shape[1] == 1:
        mixture = mixture[:, 0]
    if mixture.dim() == 3 and references.dim() == 2:
        finding = Finding(
            "batch-order",
            "error",
            f"The mixture has shape {tuple(mixture.shape)} and the references {tuple(references.shape)}: they are exchanged.",
            "Give (mixture, references): shapes (B, T) and (B, S, T).",
        )
        return [finding], None
    if mixture.dim() != 2 or references.dim() != 3 or mixture.shape != references[:, 0].shape:
        shapes = f"{tuple(mixture.shape)} and {tuple(references.shape)}"
        raise ValueError(f"batch must be (mixture, references) of shapes (B, T) and (B, S, T), not {shapes}.")
    with torch.no_grad():
        findings = _content(mixture.float(), references.float())
        if not callable(loss):
            return findings, None
        more, perfect = _loss(loss, mixture, references)
    return [*findings, *more], perfect


def _content(mixture: Tensor, references: Tensor) -> list[Finding]:
    total = references.sum(1)
    signals = stats.centred(torch.stack([mixture, total], 1))
    of_sum = stats.cosine(stats.gram(signals))[:, 0, 1].abs().median().item()
    signals = stats.centred(torch.cat([mixture[:, None], references], 1))
    cos = stats.cosine(stats.gram(signals))
    of_one = cos[:, 0, 1:].abs().amin(1).median().item()
    findings = []
    if references.shape[1] > 1 and of_one > ALIKE:
        findings.append(
            Finding(
                "references-alike",
                "warning",
                f"Every reference is nearly the mixture (|cos| at least {of_one:.3f} in the median item): there is nothing to "
                "separate.",
                "Listen to the references of one item; each must be one source.",
                evidence={"mix_cos": of_one},
            )
        )
    elif of_sum < SUM:
        findings.append(
            Finding(
                "batch-order",
                "error",
                f"The mixture is not the sum of its references: |cos| {of_sum:.2f} in the median item.",
                "Check that mixture and references come from the same item, at the same offset, in the same order.",
                evidence={"sum_cos": of_sum},
            )
        )
    return findings


def _loss(loss: Callable[[Tensor, Tensor], Tensor], mixture: Tensor, references: Tensor) -> tuple[list[Finding], float]:
    # A trace of noise, since some losses are infinite for estimates that are perfect.
    generator = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.randn(references.shape, generator=generator).to(references)
    perfect = float(loss(references + 0.01 * references.std() * noise, references))
    unseparated = float(loss(mixture[:, None].expand_as(references).contiguous(), references))
    if perfect < unseparated:
        return [], perfect
    finding = Finding(
        "loss-sign",
        "error",
        f"The loss of nearly perfect estimates is {perfect:.3g}, that of the unseparated mixture {unseparated:.3g}: training "
        "would make the outputs worse.",
        "Return the negative SI-SDR, and give the arguments in the order (estimates, references).",
        evidence={"perfect": perfect, "mixture": unseparated},
    )
    return [finding], perfect
