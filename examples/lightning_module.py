"""Lightning and stethoscope: a small classifier, observed by one callback.

Run it with `python examples/lightning_module.py`. Add `--fault` for a learning rate that makes the loss NaN.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stethoscope.integrations.lightning import MonitorCallback  # line 1


class Classifier(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
        )

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        right = self.layers(batch[0]).argmax(1) == batch[1]
        self.log("val/accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def points(n, seed):
    """Three clouds of points in 20 dimensions, one for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 20, generator=generator) + nn.functional.one_hot(y, 20), y)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", action="store_true", help="train with a learning rate that is far too high")
    lr = 1e6 if parser.parse_args().fault else 0.05

    logger = TensorBoardLogger("runs", name="lightning")
    callback = MonitorCallback(every=20)  # line 2; writes to the trainer's loggers
    trainer = Trainer(
        max_epochs=3,
        accumulate_grad_batches=2,
        logger=logger,
        callbacks=[callback],  # line 3
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    train = DataLoader(points(2048, seed=0), batch_size=32, shuffle=True)
    trainer.fit(Classifier(lr), train, DataLoader(points(512, seed=1), batch_size=64))

    print(f"\n{callback.state_dict()['step']} optimizer steps observed, {len(callback.monitor.findings)} findings:")
    for finding in callback.monitor.findings:
        print(f"  {finding}")
    print(f"Results: {logger.log_dir}\nLook at them: tensorboard --logdir runs/lightning")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
