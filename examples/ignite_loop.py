"""A training with PyTorch Ignite, observed: `python examples/ignite_loop.py` (`pip install pytorch-ignite`).

`attach` is all there is to it: five events of the engines, translated to calls of a `Monitor`. Copy it.
"""

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stethoscope import Monitor, presets, sinks


def attach(monitor: Monitor, trainer: Engine, evaluator: Engine) -> None:
    """Close a step after each iteration of `trainer`; what `evaluator` runs and computes is the phase `val`."""
    phases = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def step(engine):
        monitor.step(batch=engine.state.batch, loss=engine.state.output)

    @evaluator.on(Events.STARTED)
    def enter(_):
        phases.append(monitor.phase("val"))
        phases[-1].__enter__()

    @evaluator.on(Events.COMPLETED)
    def leave(engine):
        phases.pop().__exit__(None, None, None)
        monitor.log(engine.state.metrics, phase="val")

    # after an exception Ignite may fire both; closing twice is fine
    @trainer.on(Events.COMPLETED | Events.EXCEPTION_RAISED)
    def close(_, error=None):
        monitor.close()
        if error is not None:
            raise error


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(512, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32)

    trainer = create_supervised_trainer(model, optimizer, nn.MSELoss())
    evaluator = create_supervised_evaluator(model, metrics={"mse": Loss(nn.MSELoss())})
    memory = sinks.Memory()
    monitor = Monitor(model, optimizer, **presets.first_aid(), sinks=[memory], every=20)
    attach(monitor, trainer, evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(loader))
    trainer.run(loader, max_epochs=5)

    mse = [record.value for record in memory.records if record.name == "mse"]
    steps = {record.step for record in memory.records if record.source == "step"}
    print(f"{len(steps)} steps, validated {len(mse)} times, mean squared error {mse[0]:.3f} to {mse[-1]:.3f}")
    print(f"{len(monitor.findings)} findings")


if __name__ == "__main__":
    main()
