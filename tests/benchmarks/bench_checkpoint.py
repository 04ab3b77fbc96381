"""How long does it take to audit a checkpoint of 100 million parameters? `python tests/benchmarks/bench_checkpoint.py`."""

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from stethoscope import audits


def main():
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(100)))
    trained = {key: value + 0.1 for key, value in model.state_dict().items()}
    number = sum(value.numel() for value in trained.values())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            {"state_dict": {f"module.{key}": value for key, value in trained.items()}}, Path(folder) / "model.pt"
        )
        save_file(trained, Path(folder) / "model.safetensors")
        for name, source in (
            ("state dict", trained),
            (".pt, prefixed", Path(folder) / "model.pt"),
            (".safetensors", Path(folder) / "model.safetensors"),
        ):
            for take in range(2):
                start = time.process_time()
                audits.checkpoint(model, source)
                print(
                    f"{name}, take {take}: {number / 1e6:.0f} million elements in {time.process_time() - start:.2f} s, one thread"
                )


if __name__ == "__main__":
    main()
