"""A plain PyTorch loop, observed: `python examples/plain_loop.py`.

A small classifier learns which of three tones it hears. The training is healthy, so nothing is found.
All lines that belong to stethoscope are marked.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from stethoscope import Monitor, presets, sinks  # <- stethoscope

STEPS = 120


def tones(batch):
    """Noisy tones of 8 kHz audio, shape (batch, 1, 400), and which of three pitches each one has, shape (batch,)."""
    pitch = torch.randint(3, (batch,))
    time = torch.arange(400) / 8000
    clean = torch.sin(2 * torch.pi * (200 + 40 * pitch[:, None]) * time + 6 * torch.rand(batch, 1))
    return (clean + torch.randn(batch, 400))[:, None], pitch


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv1d(1, 16, 64, stride=16),
    nn.ReLU(),
    nn.Conv1d(16, 32, 5),
    nn.ReLU(),
    nn.AdaptiveAvgPool1d(1),
    nn.Flatten(),
    nn.Linear(32, 3),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
held_out, answers = tones(256)

memory = sinks.Memory()  # <- stethoscope
with Monitor(
    model, optimizer, **presets.first_aid(), sinks=[sinks.Console(), memory], every=20
) as monitor:  # <- stethoscope
    for _ in range(STEPS):
        audio, pitch = tones(32)
        loss = cross_entropy(model(audio), pitch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step(loss=loss)  # <- stethoscope

    model.eval()
    with torch.no_grad(), monitor.phase("val"):  # <- stethoscope
        accuracy = (model(held_out).argmax(1) == answers).float().mean()
    monitor.log({"accuracy": accuracy}, phase="val")  # <- stethoscope

print(f"accuracy on held-out tones: {accuracy:.2f}")
print("rms of each layer, first and last observed step:")
rms = [record for record in memory.records if record.name == "activation/rms" and record.phase == "train"]
for layer in filter(None, dict.fromkeys(record.module for record in rms)):  # "" is the model as a whole
    values = [record.value for record in rms if record.module == layer]
    print(f"  {layer} {type(model.get_submodule(layer)).__name__:17} {values[0]:6.3f} {values[-1]:6.3f}")
for finding in monitor.findings:
    print(finding)
