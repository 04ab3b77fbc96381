"""Means over an epoch that do not lie, and a count of the updates that an optimizer really made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from stethoscope._metrics import normalise
from stethoscope._record import Finding, Report
from stethoscope.watches._metric_means import Tally, disagrees

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.optim import Optimizer


class Mean:
    """The weighted mean of metric dictionaries, kept where the metrics are; adding waits for nothing.

    Sum and weight start at 0, None counts for neither, and a batch that is not finite either makes the mean NaN or is
    left out of both sum and weight, and counted. For anything but means (F1, AUROC, corpus WER) use torchmetrics: they
    are no means of batches.

    Args:
        nonfinite: `"propagate"`: one NaN batch makes the mean NaN; `"skip"`: it is left out, see `skipped`.

    Examples:
        >>> mean = Mean()
        >>> mean.add({"loss": torch.tensor(3.0), "th_accuracy": None}, weight=8)
        >>> mean.add({"loss": torch.tensor(1.0), "th_accuracy": None}, weight=24)
        >>> mean.result()
        {'loss': tensor(1.5000, dtype=torch.float64), 'th_accuracy': None}
    """

    def __init__(self, nonfinite: Literal["propagate", "skip"] = "propagate") -> None:
        if nonfinite not in {"propagate", "skip"}:
            raise ValueError(f"nonfinite={nonfinite!r} is unknown. Legal: 'propagate', 'skip'.")
        self.nonfinite = nonfinite
        self._rows: dict[str, Tensor | None] = {}

    def add(self, metrics: object, weight: float | Tensor = 1.0) -> None:
        """Take in one batch. Five small operations per tensor.

        Args:
            metrics: any toolkit's dictionary, see `Monitor.log`; values on the host or on a device. What is no scalar
                counts as None.
            weight: number of items, frames or tokens that the values are means over; host or device.
        """
        for name, value, _ in normalise(metrics):
            row = None if value is None else _row(torch.as_tensor(value), weight)
            before = self._rows.get(name)
            if row is None or before is None:
                self._rows[name] = before if row is None else row
            else:
                self._rows[name] = before + row.to(before.device)

    def result(self) -> dict[str, Tensor | None]:
        """Return name -> mean, a 0-d tensor where the metrics were; None where no batch had a value.

        float64, float32 on MPS. Waits for nothing. With `"skip"`, NaN where no batch was finite.
        """
        means: dict[str, Tensor | None] = {}
        for name, row in self._rows.items():
            if row is None:
                means[name] = None
                continue
            total, weight, _, lost, _ = row
            mean = total / weight
            means[name] = mean if self.nonfinite == "skip" else torch.where(lost > 0, torch.nan, mean)
        return means

    def skipped(self) -> dict[str, Tensor]:
        """Return name -> number of batches that were not finite, 0-d tensors."""
        return {name: row[3] for name, row in self._rows.items() if row is not None}

    def check(self, shown: Mapping[str, float | Tensor | None], phase: str = "val") -> Report:
        """Compare means that somebody else computed from the same batches with these. Waits for the device.

        Args:
            shown: what is shown as the result of the epoch.
            phase: for the findings.

        Examples:
            >>> mean = Mean()
            >>> mean.add({"loss": 26.81}, weight=6)
            >>> print(mean.check({"loss": 22.98}).findings[0].evidence["said"])
            the mean of the 1 finite batches is 26.81, shown is 22.98: its denominator starts at 1
        """
        found = []
        for name, value in shown.items():
            row = self._rows.get(name)
            if row is None or value is None:
                continue
            total, weight, batches, lost, lost_weight = map(float, row)
            # The mean is all that is known of the size of a batch.
            size = abs(total / weight) if weight else 0.0
            tally = Tally(int(batches), total, weight, -size, size, int(lost), lost_weight, weighted=True)
            if said := tally.disagreement(float(value)):
                found.append(disagrees(name, said, None, phase))
        return Report(title=f"means of {phase}", summary=f"{len(self._rows)} metrics", findings=tuple(found))


def updates(optimizer: Optimizer, steps: int) -> Report:
    """Compare the updates that an optimizer made with the steps that were counted.

    A step that is skipped for a NaN gradient, by a loop or by `GradScaler`, does not advance the optimizer, while the
    scheduler and the step counter may go on: the learning rate is then decayed for updates that were never made. Waits
    for the device.

    Args:
        optimizer: one that counts its steps in its state (Adam and its relatives); SGD does not, which is said.
        steps: optimizer steps that were counted since the optimizer was made.
    """
    title = "updates of the optimizer"
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    if not counts:
        return Report(title=title, summary=f"{type(optimizer).__name__} has counted no step in its state.")
    made = int(max(map(float, counts)))
    found: tuple[Finding, ...] = ()
    if made < steps:
        message = f"{steps - made} of {steps} counted steps made no update: the optimizer has made {made}."
        found = (
            Finding(
                "metric-aggregate",
                "warning",
                message,
                "Advance the scheduler and the step counter only when the optimizer stepped, and report how many were skipped.",
                evidence={"steps": steps, "updates": made},
            ),
        )
    return Report(title=title, summary=f"{made} updates in {steps} steps", findings=found)


def _row(value: Tensor, weight: float | Tensor) -> Tensor:
    """Return total, weight, batches, and of non-finite ones batches and weight: all of them add up."""
    number = value.to(torch.float32 if value.device.type == "mps" else torch.float64)
    finite = torch.isfinite(number)
    if isinstance(weight, torch.Tensor):
        by = weight.detach().to(number.device, number.dtype).reshape(())
    else:  # filled on the device: a copy from the host would wait
        by = torch.full((), weight, dtype=number.dtype, device=number.device)
    # where and not a product: 0 * NaN is NaN
    total = torch.where(finite, number * by, 0.0)
    return torch.stack([total, by * finite, finite.to(by.dtype), (~finite).to(by.dtype), by * ~finite])
