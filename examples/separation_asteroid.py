"""Why do both outputs sound the same? Asteroid's DPRNNTasNet, trained three times: healthy and with two faults.

    pip install stethoscope asteroid
    python separation_asteroid.py healthy     # permutation invariant loss: nothing but infos
    python separation_asteroid.py nonpit      # references in random order: both outputs become the same
    python separation_asteroid.py swapped     # trained well, but validated with a checkpoint that was not loaded

Each run takes about a minute on one CPU thread. Sources are harmonic voices of two speakers with different pitch.
"""

from __future__ import annotations

import argparse

import torch
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
from asteroid.models import DPRNNTasNet
from torch import Tensor, nn

from stethoscope import Monitor, audits, watches

STEPS, BATCH, SIZE, RATE = 300, 4, 4000, 8000


def voices(g: torch.Generator) -> Tensor:
    """References (BATCH, 2, SIZE): six harmonics each, a slow envelope, a low and a high voice in random order."""
    time = torch.arange(SIZE) / RATE
    low = 80 + 60 * torch.rand(BATCH, 1, generator=g)
    pitch = torch.cat([low, 2.3 * low], 1)
    pitch = torch.where(torch.rand(BATCH, 1, generator=g) < 0.5, pitch, pitch.flip(1))[..., None, None]
    order = torch.arange(1, 7)[:, None]
    phase = 6.283 * torch.rand(BATCH, 2, 6, 1, generator=g)
    tones = torch.sin(6.283 * pitch * order * time + phase) / order
    envelope = 1 + 0.8 * torch.sin(6.283 * (1 + 3 * torch.rand(BATCH, 2, 1, generator=g)) * time)
    signals = tones.sum(2) * envelope
    return signals / signals.std(-1, keepdim=True)


def separator() -> nn.Module:
    """DPRNNTasNet, small enough for a CPU."""
    return DPRNNTasNet(
        n_src=2,
        n_filters=32,
        kernel_size=16,
        stride=8,
        bn_chan=32,
        hid_size=32,
        chunk_size=40,
        n_repeats=2,
        sample_rate=RATE,
    )


def main(case: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(1)
    model = separator()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pit = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")

    references = voices(g)
    print(audits.training(optimizer, model, batch=(references.sum(1), references), loss=pit))

    watching = [watches.Plateau(), watches.Jumps(), watches.OutputCollapse(), watches.Assignment()]
    watching.append(watches.OutputCollapse(phase="val"))
    with Monitor(model, optimizer, watches=watching, every=5, planned_steps=STEPS) as monitor:
        for step in range(STEPS):
            references = voices(g)
            mixture = references.sum(1)
            estimates = model(mixture)
            if case == "nonpit":  # the order of `references` is random, so no output can settle on one voice
                loss = pairwise_neg_sisdr(estimates, references).diagonal(dim1=1, dim2=2).mean()
            else:
                loss = pit(estimates, references)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            monitor.step(loss=loss, estimates=estimates, references=references, mixture=mixture)
            if step % 50 == 49:
                validate(model, case, monitor, g)
                print(f"step {step + 1}: loss {loss.item():.1f} dB")


@torch.no_grad()
def validate(model: nn.Module, case: str, monitor: Monitor, g: torch.Generator) -> None:
    """One batch through the model as it is saved and loaded again."""
    weights = model.state_dict()
    if case == "swapped":  # the checkpoint comes from a wrapper, and strict=False says nothing about it
        weights = {f"module.{name}": value for name, value in weights.items()}
    loaded = separator()
    loaded.load_state_dict(weights, strict=False)
    references = voices(g)
    with monitor.phase("val"):
        mixture = references.sum(1)
        monitor.observe(estimates=loaded(mixture), references=references, mixture=mixture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["healthy", "nonpit", "swapped"])
    main(parser.parse_args().case)
