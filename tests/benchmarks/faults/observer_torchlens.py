"""TorchLens 2.36.1, its `checks.ChecksSession` with every check that has a default, told of the scaler and the clipping."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING

from faults._seen import Seen, once

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from faults._training import Batch, Tensors, Training

MEANS = {
    "param_grad_nonfinite": ("nonfinite-gradient", "nonfinite-loss", "nonfinite-activation"),
    "param_value_nonfinite": ("nonfinite-parameter", "nonfinite-optimizer"),
    "param_received_no_gradient": ("gradient-zero", "module-unused", "parameter-unchanged"),
    "param_movement_decay_band": ("gradient-zero", "module-unused", "parameter-unchanged"),
    "frozen_param_changed": ("parameter-changed",),
    "grad_magnitude_flagged": ("gradient-exploding", "gradient-vanishing"),
}


class TorchLens:
    """Update ratios have no default bounds and are left out."""

    name = "TorchLens checks"

    def start(self, training: Training) -> None:
        from torchlens.checks import ChecksSession

        frozen = [name for name, p in training.model.named_parameters() if not p.requires_grad]
        self.session = ChecksSession(
            training.model,
            training.optimizers,
            scaler=training.scaler,
            clip_norm=training.clip,
            accumulation_steps=training.accumulate,
        )
        self.session.register_change_check(action="collect")
        self.session.register_nonfinite_gradient_check(action="collect")
        self.session.register_nonfinite_param_check(action="collect")
        self.session.register_magnitude_check()
        if frozen:
            self.session.register_frozen_check(frozen, action="collect")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.session.attach()

    def backward_done(self, training: Training, step: int) -> None:
        pass

    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None:
        pass

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None:
        pass

    def finish(self) -> list[Seen]:
        report = self.session.report()
        self.session.detach()
        return once(
            [
                Seen(
                    MEANS[f.code],
                    (f.accepted_step_id or f.attempted_step_id or f.backward_id or 1) - 1,
                    tuple(f.names) or ("",),
                    f"{f.code} {f.message}",
                    info=f.severity == "info",
                )
                for f in report.findings
                if f.code in MEANS
            ]
        )
