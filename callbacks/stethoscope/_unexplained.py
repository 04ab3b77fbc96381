"""What the guard says when the step, run again, gives no culprit: as much as is certain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME = "Monitor(replay=fn) and monitor.observe(batch) before optimizer.step() name the operation."


def unexplained(
    loss: float | None, bad: Sequence[str], *, repeated: bool, whole: bool, spoilt: bool, trouble: str
) -> Finding:
    """Return the finding for a bad step whose culprit was not found.

    Args:
        loss: if it was not finite.
        bad: names of the parameters whose gradient is not.
        repeated: whether the step was run again.
        whole: whether by the user's `replay`, which includes the loss.
        spoilt: whether what the loss handed back to the model was not finite.
        trouble: what kept the step from being repeated, or from being repeated as a whole.
    """
    again = "run again, the forward pass is finite" if repeated else "no call of the model was seen in this step"
    if whole and repeated:
        again = "run again, the step is finite: the replay differed"
    if trouble:
        again = f"{again}, but {trouble}" if repeated else trouble
    advice = _NAME
    if whole and repeated:
        advice = (
            "Random numbers of other generators or threads, plain Python state, a batch that was changed in place, or "
            "non-deterministic kernels (torch.use_deterministic_algorithms(True)) make a step that cannot be repeated."
        )
    evidence = {"replay": "differed" if whole and repeated else "none" if not repeated else "finite"}
    if loss is not None:
        first = "" if whole else "Look at the loss function: log, sqrt or a division of zero, a target out of range. "
        return Finding(
            "nonfinite-loss",
            "error",
            f"The loss is {loss}; {again}.",
            f"{first}{advice}",
            evidence={"origin": "loss", **evidence},
        )
    one = len(bad) == 1
    named = ", ".join([*bad[:3], *(["..."] if len(bad) > 3 else [])])
    which = f"The gradient of {bad[0]!r} is" if one else f"{len(bad)} gradients ({named}) are"
    born = ""
    if spoilt and not whole:
        born = (
            " What comes back to the model's outputs is not finite already: the fault is in the loss function, or in what runs "
            "after the calls that were repeated."
        )
        advice = f"Look for sqrt, norm, std or a division at zero in the loss function. {advice}"
    return Finding(
        "nonfinite-gradient",
        "error",
        f"{which} not finite before the optimizer writes; {again}.{born}",
        advice,
        module=bad[0].rpartition(".")[0] if one else "",
        evidence={"origin": "backward", "parameter": bad[0] if one else "", "in_loss": bool(born), **evidence},
    )


def elsewhere(rank: int) -> Finding:
    """Return the finding for a step that is bad on another rank, and that no rank may write."""
    return Finding(
        "nonfinite-gradient",
        "error",
        f"The loss or a gradient of rank {rank} is not finite, here all is well.",
        f"Rank {rank} says more in its log and its file, and to rank 0.",
        evidence={"origin": "rank", "culprit_rank": rank},
    )


def is_elsewhere(findings: Sequence[Finding]) -> bool:
    """Whether these say no more than that another rank knows more."""
    return any(each.evidence.get("origin") == "rank" for each in findings)
