"""torch-audit 0.3.0, through its `autopatch`, at the steps that ours looks at."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from faults._seen import Seen, once
from faults.observer_ours import EVERY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from faults._training import Batch, Tensors, Training

MEANS = {
    "TA100": (
        "nonfinite-parameter",
        "nonfinite-gradient",
        "nonfinite-loss",
        "nonfinite-optimizer",
        "nonfinite-activation",
    ),
    "TA102": ("gradient-exploding", "update-ratio-high"),
    "TA103": ("gradient-zero", "dead-units", "module-unused", "parameter-unchanged"),
    "TA104": ("gradient-zero", "parameter-unchanged"),
    "TA105": ("dead-units", "output-silent"),
    "TA301": ("input-range", "input-drift"),
    "TA302": ("input-constant",),
    "TA305": ("input-nonfinite", "nonfinite-input"),
    "TA500": ("module-unused",),
}
"""Rules about the health of a training. The others are advice on style and speed (channels last, bias before BatchNorm,
tensor cores, AdamW) and are not counted, neither for it nor against it."""


class TorchAudit:
    """Its findings are listed once per rule and entity by itself."""

    name = "torch-audit"

    def start(self, training: Training) -> None:
        from torch_audit import autopatch

        optimizer = training.optimizers[0]
        self.auditor = autopatch(
            training.model, optimizer=optimizer, every_n_steps=EVERY, suppress_internal_errors=True
        )

    def backward_done(self, training: Training, step: int) -> None:
        pass

    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None:
        pass

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None:
        pass

    def finish(self) -> list[Seen]:
        result = self.auditor.finish()
        self.auditor.unpatch()
        return once(
            [
                Seen(
                    MEANS[f.rule_id],
                    f.step or 0,
                    (f.module_path or f.entity or "",),
                    f"{f.rule_id} {f.message}",
                    info=f.severity.value == "INFO",
                )
                for f in result.findings
                if f.rule_id in MEANS
            ]
        )
