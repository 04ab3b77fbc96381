"""A metric that only one model has: from a KeyError after an epoch to a contract. Runs on CPU in a second.

python examples/metric_contract.py
"""

import torch
from torch import nn

from stethoscope import Monitor, audits
from stethoscope.aggregate import Mean
from stethoscope.testing import assert_metrics
from stethoscope.watches import Field, MetricSchema

torch.manual_seed(0)


class Recogniser(nn.Module):
    """Batch (B, 16) and labels (B,) -> a dictionary of metrics. The transducer variant has no accuracy."""

    def __init__(self, *, transducer):
        super().__init__()
        self.body, self.transducer = nn.Linear(16, 4), transducer

    def forward(self, batch, labels):
        logits = self.body(batch)
        metrics = {"loss": nn.functional.cross_entropy(logits, labels)}
        if not self.transducer:
            metrics["th_accuracy"] = (logits.argmax(-1) == labels).float().mean()
        return metrics


def batch():
    return torch.randn(8, 16), torch.randint(4, (8,))


def steps(model):
    def train_step(given):
        return model(*given)

    def val_step(given):
        metrics = model(*given)
        # What fails after an epoch.
        return {"loss": metrics["loss"], "acc": metrics["th_accuracy"]}

    return train_step, val_step


# 1. Before the training: one batch of each phase. The KeyError comes now.
broken = Recogniser(transducer=True)
report = audits.metrics(*steps(broken), batch(), batch())
print(report, "\n")

# 2. The contract: what the metrics are, for people and for programs.
schema = MetricSchema(
    {
        "loss": Field(float, ge=0.0, unit="nat", better="lower"),
        "th_accuracy": Field(float | None, ge=0.0, le=1.0, better="higher", required=False),
        "num_utts": Field(int, gt=0, required=False),
        "cv_loss": Field(float, mean_of="loss", weight="num_utts"),
    }
)
print(schema.to_markdown())

# 3. Read safely: every declared key is there, and no number is made up.
broken_metrics = broken(*batch())
print("validate:", schema.validate(broken_metrics, phase="val"), "\n")

# 4. While training: findings instead of an exception.
model = Recogniser(transducer=False)
assert_metrics(lambda given: model(*given), batch(), schema)
optimizer = torch.optim.Adam(model.parameters())
with Monitor(model, optimizer, watches=[schema]) as monitor:
    for _ in range(20):
        metrics = model(*batch())
        metrics["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss=metrics["loss"])
        monitor.log({name: value.detach() for name, value in metrics.items()}, phase="train")
    mean, total, seen = Mean(), 0.0, 1  # a denominator that starts at 1, as in the wild
    with torch.no_grad():
        for _ in range(3):
            metrics = model(*batch())
            mean.add(metrics, weight=8)
            total, seen = total + metrics["loss"] * 8, seen + 8
            monitor.log({**metrics, "num_utts": 8}, phase="cv")
    monitor.log({"cv_loss": total / seen}, phase="cv")
# What was found is in monitor.findings; without a sink, warnings go to logging, hence to stderr.
print("found:", [finding.code for finding in monitor.findings])
print("honest:", {name: round(float(value), 4) for name, value in mean.result().items()})
