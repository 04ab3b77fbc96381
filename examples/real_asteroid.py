"""Observe Asteroid's own ConvTasNet and DPRNNTasNet for a few training steps.

Asteroid is not a dependency of stethoscope. In an environment of its own, in a checkout of stethoscope:

    pip install torch==2.13.0 asteroid==0.7.0 && pip install -e .
    python examples/real_asteroid.py

The networks are smaller than the published ones and learn to separate noise from noise: it is about looking inside,
not about a good separation. Nothing of Asteroid is changed or subclassed.
"""

import sys

import torch
from rich.console import Console
from rich.table import Table

from stethoscope import Monitor, presets, sinks

try:
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import ConvTasNet, DPRNNTasNet
except ImportError as error:
    sys.exit(f"This example needs Asteroid ({error}): pip install asteroid==0.7.0")

STEPS, BATCH, SAMPLES = 6, 2, 8000

console = Console()


def train(model):
    """Train on noise and return what was measured and what was found."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_function = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    memory = sinks.Memory()
    with Monitor(model, optimizer, **presets.first_aid(), sinks=[memory], every=STEPS - 1) as monitor:
        for _ in range(STEPS):
            sources = torch.randn(BATCH, 2, SAMPLES) * torch.tensor([1.0, 0.3])[:, None]
            estimates = model(sources.sum(1))
            loss = loss_function(estimates, sources)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            monitor.step(loss=loss)
    return memory.records, monitor.findings


def table(title, records):
    """One row per layer: its output's rms, its parameters' gradient norm, and how far the step moved them."""
    last = {(record.name, record.module): record.value for record in records if record.step == STEPS - 1}
    called = [module for name, module in last if name == "activation/rms" and module]
    result = Table("layer", "rms", "zeros", "gradient", "update", title=title, title_justify="left")
    for layer in called:
        if any(other.startswith(f"{layer}.") for other in called):
            continue  # its parts have rows of their own
        inside = {name: value for name, value in last.items() if name[1].startswith(f"{layer}.")}
        gradients = [value for (name, _), value in inside.items() if name == "gradient/norm"]
        updates = [value for (name, _), value in inside.items() if name == "parameter/update_ratio"]
        result.add_row(
            layer,
            f"{last['activation/rms', layer]:.3g}",
            f"{last['activation/zero_fraction', layer]:.0%}",
            f"{sum(value**2 for value in gradients) ** 0.5:.3g}" if gradients else "",
            f"{max(updates):.3g}" if updates else "",
        )
    return result


torch.manual_seed(0)
models = {
    "ConvTasNet": ConvTasNet(n_src=2, n_repeats=1, n_blocks=4, bn_chan=32, hid_chan=64, skip_chan=32, n_filters=64),
    "DPRNNTasNet": DPRNNTasNet(n_src=2, bn_chan=32, hid_size=32, n_repeats=2, n_filters=64),
}
for name, model in models.items():
    records, findings = train(model)
    losses = [record.value for record in records if record.name == "loss"]
    console.print(table(f"asteroid {name}, step {STEPS - 1}", records))
    console.print(f"loss {losses[0]:.1f} -> {losses[-1]:.1f} dB, {len(findings)} findings")
    for finding in findings:
        console.print(f"  {finding}", markup=False)
