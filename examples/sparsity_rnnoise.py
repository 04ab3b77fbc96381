"""RNNoise's sparsification, before and in the loop, on your own checkout of https://github.com/xiph/rnnoise.

    git clone https://github.com/xiph/rnnoise
    python examples/sparsity_rnnoise.py rnnoise --sequences 3000 --batch-size 128 --epochs 50

Part 1 asks whether the schedule that RNNoise is built with happens at all in a run of that size. Part 2 trains on random
features for 40 steps, twice, with a short schedule: once through to the end, then resumed with a new sparsifier, as
`--initial-checkpoint` does. Nothing is downloaded, nothing is written. A few seconds on one core.
"""

import argparse
import sys
from pathlib import Path

import torch

from stethoscope import Monitor, audits, watches

TARGET = {"gru?.weight_ih*": (0.3 + 0.2 + 0.5) / 3}  # of the gates r, z, n; the recurrent matrices keep their diagonals


def train(model, schedule, steps):
    """A loop as in train_rnnoise.py; returns what the watch found."""
    for sparsifier in model.sparsifier:
        sparsifier.start, sparsifier.stop, sparsifier.interval = schedule.start, schedule.stop, schedule.interval
        sparsifier.step_counter = 0  # a new process counts from 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = watches.Sparsity(schedule, target=TARGET, block=(8, 4))
    with Monitor(model, optimizer, watches=[watch], planned_steps=steps) as monitor:
        for _ in range(steps):
            gains, _, _ = model(torch.randn(2, 10, 65))
            loss = gains.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.sparsify()
            monitor.step(loss=loss)  # after the sparsifier: one step later the zeros are gone
    return monitor.findings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="path to your checkout of RNNoise")
    parser.add_argument("--sequences", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--gru-size", type=int, default=384)
    arguments = parser.parse_args()
    folder = arguments.checkout / "torch" / "rnnoise"
    if not (folder / "rnnoise.py").exists():
        parser.error(f"{folder} holds no rnnoise.py: give the folder that git clone made.")
    sys.path.insert(0, str(folder))
    import rnnoise  # type: ignore[import-not-found]  # the user's own

    print("1. Before the run\n")
    steps = audits.planned_steps(
        epochs=arguments.epochs, items=arguments.sequences, batch_size=arguments.batch_size, drop_last=True
    )
    built_in = (rnnoise.sparsify_start, rnnoise.sparsify_stop, rnnoise.sparsify_interval)
    print(audits.plan(audits.Schedule("sparsify", *built_in), steps))

    print("\n2. In the loop\n")
    torch.manual_seed(0)
    model = rnnoise.RNNoise(gru_size=arguments.gru_size)
    print("fresh:   ", audits.sparsity(model.gru1, weights=("weight_ih*",), target=1 / 3))
    found = train(model, audits.Schedule("sparsify", 10, 30, 5), 40)
    print("finished:", audits.sparsity(model.gru1, weights=("weight_ih*",), target=1 / 3))
    print("findings:", *found or ["none"], sep="\n  ")
    found = train(model, audits.Schedule("sparsify", 100, 300, 5), 40)
    print("resumed: ", audits.sparsity(model.gru1, weights=("weight_ih*",), target=1 / 3))
    print("findings:", *found, sep="\n  ")


if __name__ == "__main__":
    main()
