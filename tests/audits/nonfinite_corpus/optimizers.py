"""Short trainings in which the optimizer spoils the weights, under `Monitor(guard="skip")`; healthy ones beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from stethoscope import Monitor, presets

if TYPE_CHECKING:
    from collections.abc import Callable

nan, inf = float("nan"), float("inf")


@dataclass(frozen=True)
class Training:
    """Some steps of one model. `before(step)` runs at the beginning of each."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    before: Callable[[int], None] = lambda step: None
    steps: int = 4

    def findings(self) -> list[Any]:
        dtype = next(self.model.parameters()).dtype
        generator = torch.Generator().manual_seed(1)

        def loss_of(batch: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(self.model(batch)[:, 0], batch.sum(1))

        with Monitor(self.model, self.optimizer, guard="skip", replay=loss_of, **presets.first_aid()) as monitor:
            for step in range(self.steps):
                self.before(step)
                batch = torch.randn(6, 4, generator=generator).to(dtype)
                loss = loss_of(batch)
                self.optimizer.zero_grad()
                loss.backward()
                monitor.observe(batch, loss=loss)
                self.optimizer.step()
                if self.scheduler is not None:
                    self.scheduler.step()
                monitor.step(loss=loss)
        return monitor.findings


@dataclass(frozen=True)
class Written:
    """What the first finding about it must say."""

    group: int | None
    parameter: str | None = None  # several are equally right: "a|b"; None: the settings of the group are at fault
    state: str = ""  # the one state tensor that is at fault
    code: str = "nonfinite-optimizer"

    def wrong(self, findings: list[Any]) -> str:
        said = next((finding for finding in findings if finding.severity == "error"), None)
        if said is None:
            return "nothing was found"
        if said.code != self.code:
            return f"code: {said.code}: {said.message}"
        if said.evidence.get("group") != self.group:
            return f"group: {said.evidence.get('group')!r}, not {self.group}"
        if self.parameter and not any(name in said.message for name in self.parameter.split("|")):
            return f"parameter: not {self.parameter!r}: {said.message}"
        spoilt = [name for name, what in said.evidence.get("state", {}).items() if what != "finite"]
        return "" if spoilt == [self.state] * bool(self.state) else f"state: {spoilt}, not {self.state!r}"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def with_dead_unit():
    """A unit that is never on, so that its weights' gradients are exactly zero."""
    model = net()
    model[0].bias.data[3] = -100
    return model


def eps_of_zero():
    model = with_dead_unit()
    return Training(model, torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0))


def weights_in_half_precision():
    model = with_dead_unit().half()
    return Training(model, torch.optim.Adam(model.parameters(), lr=0.01, foreach=False))


def negative_second_moment_after_resuming():
    model = net()
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}], lr=0.01
    )

    def resume(step):
        if step == 2:
            optimizer.state[model[2].weight]["exp_avg_sq"][0, 5] = -1.0

    return Training(model, optimizer, before=resume)


def resumed_with_momentum(value):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def resume(step):
        if step == 1:
            optimizer.state[model[0].bias]["momentum_buffer"][2] = value

    return Training(model, optimizer, before=resume)


def infinite_momentum_after_resuming():
    return resumed_with_momentum(-inf)


def infinite_momentum_that_switches_a_unit_off():
    """Its bias becomes minus infinity, its output zero: loss and gradients stay finite."""
    return resumed_with_momentum(inf)


def learning_rate_is_infinite():
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01)

    def warm_up(step):
        optimizer.param_groups[1]["lr"] = 0.01 / (2 - step) if step != 2 else inf

    return Training(model, optimizer, before=warm_up, steps=3)


def scheduler_returns_NaN():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return Training(
        model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else nan)
    )


def weight_decay_is_NaN():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.param_groups[0]["weight_decay"] = nan
    return Training(model, optimizer)


def step_that_leaves_the_range_of_the_weights():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def jump(step):
        optimizer.param_groups[0]["lr"] = 3e38 if step == 2 else 0.01

    return Training(model, optimizer, before=jump)


FAULTS = {
    eps_of_zero: Written(0, "0.weight|0.bias|2.weight"),
    weights_in_half_precision: Written(0, "0.weight|0.bias|2.weight"),
    negative_second_moment_after_resuming: Written(1, "2.weight", state="exp_avg_sq"),
    infinite_momentum_after_resuming: Written(0, "0.bias", state="momentum_buffer"),
    # loss and gradients stay finite, so the guard has no reason to look; the watch of weights names it
    infinite_momentum_that_switches_a_unit_off: Written(None, "0.bias", code="nonfinite-parameter"),
    learning_rate_is_infinite: Written(1),
    scheduler_returns_NaN: Written(0),
    weight_decay_is_NaN: Written(0),
    step_that_leaves_the_range_of_the_weights: Written(0, "0.weight|0.bias|2.weight|2.bias"),
}


def adam():
    model = with_dead_unit()
    return Training(model, torch.optim.Adam(model.parameters(), lr=0.01))


def warm_up_from_zero():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Training(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4))


def frozen_layer():
    model = net()
    model[0].requires_grad_(requires_grad=False)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True))


def bfloat16_weights():
    model = net().bfloat16()
    return Training(model, torch.optim.Adam(model.parameters(), lr=0.01))


HEALTHY = [adam, warm_up_from_zero, frozen_layer, bfloat16_weights]
