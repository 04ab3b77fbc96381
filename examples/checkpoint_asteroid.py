"""A DPRNN-TasNet that is only half loaded, and what each kind of gap costs. Needs asteroid (`pip install asteroid`).

    python examples/checkpoint_asteroid.py

Trains a tiny DPRNN-TasNet to separate low from high noise (ten seconds on one core), saves it as Asteroid does, and loads it
in five ways that all pass `strict=False` without a word; the last one passes `strict=True` as well. Each time the report
comes first, and then the SI-SDR that the loaded model reaches.
"""

import tempfile
from pathlib import Path

import torch
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
from asteroid.models import DPRNNTasNet

from stethoscope import audits

CONFIGURATION = {
    "n_src": 2,
    "n_filters": 64,
    "kernel_size": 16,
    "bn_chan": 32,
    "hid_size": 32,
    "chunk_size": 50,
    "n_repeats": 1,
    "sample_rate": 8000,
    "mask_act": "sigmoid",
}


def batch(generator, items=4, length=4000):
    """Two sources: noise below and above 1.5 kHz. Returns mixture (items, time) and sources (items, 2, time)."""
    spectrum = torch.fft.rfft(torch.randn(items, 2, length, generator=generator))
    low = torch.linspace(0, 4000, spectrum.shape[-1]) < 1500
    spectrum[:, 0] *= low
    spectrum[:, 1] *= ~low
    sources = torch.fft.irfft(spectrum, length)
    sources = sources / sources.std(-1, keepdim=True)
    return sources.sum(1), sources


def train(model, loss, steps=150):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        mixture, sources = batch(generator)
        value = loss(model(mixture), sources)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()


def main():
    torch.manual_seed(0)
    loss = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    trained = DPRNNTasNet(**CONFIGURATION)
    train(trained, loss)
    mixture, sources = batch(torch.Generator().manual_seed(2), items=8)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pth"
        torch.save({**trained.serialize(), "stethoscope": audits.describe(trained)}, file)
        state = trained.state_dict()
        ways = {
            "as it was saved": (file, {}),
            "from DataParallel, every key behind 'module.'": ({f"module.{k}": v for k, v in state.items()}, {}),
            "without the masker": ({k: v for k, v in state.items() if not k.startswith("masker")}, {}),
            "without encoder and decoder, 2 of 38 keys": ({k: v for k, v in state.items() if "coder" not in k}, {}),
            "complete, into a model with another mask activation": (file, {"mask_act": "relu"}),
        }
        for name, (source, change) in ways.items():
            torch.manual_seed(3)
            model = DPRNNTasNet(**{**CONFIGURATION, **change})
            print(f"--- {name}\n{audits.checkpoint(model, source, example=mixture)}")
            weights = trained.state_dict() if source is file else source
            model.load_state_dict(weights, strict=False)  # what most programs do
            with torch.no_grad():
                estimates = model.eval()(mixture)
            alike = torch.nn.functional.cosine_similarity(estimates[:, 0], estimates[:, 1], dim=-1).abs().mean()
            print(f"    SI-SDR {-loss(estimates, sources).item():.1f} dB, cosine of the outputs {alike:.3f}\n")


if __name__ == "__main__":
    main()
