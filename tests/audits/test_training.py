from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from stethoscope import audits
from stethoscope.separation_stats import centred, cosine, gram, si_sdr_db


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def codes(report) -> list[str]:
    return [finding.code for finding in report.findings]


def pit_loss(estimates, references):
    sources = references.shape[1]
    scores = si_sdr_db(cosine(gram(centred(torch.cat([estimates, references], 1)))))[:, :sources, sources:]
    straight, crossed = scores[:, 0, 0] + scores[:, 1, 1], scores[:, 0, 1] + scores[:, 1, 0]
    return -torch.maximum(straight, crossed).mean() / 2


def test_sound_set_up_is_ok():
    net = model()
    report = audits.training(Adam(net.parameters()), net)
    assert report.ok
    assert report.findings == ()


def test_optimizer_of_a_copy_is_an_error():
    report = audits.training(Adam(model().parameters()), model())
    assert codes(report) == ["optimizer-owns-others"]
    assert "None of the 6 trainable parameters" in report.findings[0].message
    assert not report.ok


def test_missing_twice_and_frozen_parameters_are_named():
    net = model()
    assert "'2.weight', '2.bias'" in str(audits.training(SGD(net[:2].parameters(), lr=1), net))
    both = [SGD(net.parameters(), lr=1), SGD(net[2].parameters(), lr=1)]
    report = audits.training(both, net)
    assert codes(report) == ["optimizer-duplicate-parameters"]
    assert "2 parameters are in the optimizers more than once: '2.weight', '2.bias'" in report.findings[0].message
    net[0].requires_grad_(False)
    report = audits.training(SGD(net.parameters(), lr=1), net)
    assert codes(report) == ["optimizer-frozen-parameters"]
    assert report.ok


def test_weight_decay_on_norms_and_biases_is_an_info_and_groups_without_are_fine():
    net = model()
    report = audits.training(AdamW(net.parameters()), net)
    assert codes(report) == ["weight-decay-on-norms"]
    assert "4 weights of norms and biases: '0.bias', '1.weight', '1.bias', '2.bias'" in report.findings[0].message
    decay = [p for p in net.parameters() if p.dim() > 1]
    rest = {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0}
    assert audits.training(AdamW([{"params": decay}, rest]), net).findings == ()


def test_relative_threshold_is_blind_for_a_negative_loss_as_torch_shows():
    """The finding's claim, on torch itself: -10 for ever never cuts the rate, +10 does."""
    net = model()
    for level, cut in ((-10.0, False), (10.0, True)):
        optimizer = SGD(net.parameters(), lr=1.0)
        scheduler = ReduceLROnPlateau(optimizer)
        for _ in range(40):
            scheduler.step(level)
        assert (optimizer.param_groups[0]["lr"] < 1) == cut
        found = codes(audits.training(optimizer, net, scheduler, loss=level))
        assert found == ([] if cut else ["scheduler-negative-loss"])
    absolute = ReduceLROnPlateau(optimizer, threshold_mode="abs")
    assert audits.training(optimizer, net, absolute, loss_sign="negative").findings == ()
    assert audits.training(optimizer, net, scheduler).findings == ()


@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda o: OneCycleLR(o, 1.0, total_steps=600), 600),
        (lambda o: CosineAnnealingLR(o, 600), 600),
        (lambda o: PolynomialLR(o, 600), 600),
        (lambda o: LambdaLR(o, lambda step: max(0.0, 1 - step / 600)), 600),
    ],
)
def test_schedule_that_ends_before_the_run_is_reported(make, end):
    net = model()
    optimizer = SGD(net.parameters(), lr=1.0)
    scheduler = make(optimizer)
    report = audits.training(optimizer, net, scheduler, planned_steps=1000)
    assert codes(report) == ["scheduler-ends-early"]
    assert f"over after {end} of 1,000 steps" in report.findings[0].message
    assert audits.training(optimizer, net, scheduler, planned_steps=600).findings == ()
    assert audits.training(optimizer, net, scheduler).findings == ()


def test_trainers_are_read():
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EarlyStopping

    net = model()
    optimizer = Adam(net.parameters())
    stop = EarlyStopping("val_loss", strict=False)
    trainer = lightning.Trainer(
        max_steps=10,
        callbacks=[stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    assert codes(audits.training(optimizer, net, trainer=trainer)) == ["early-stopping-blind"]
    stop.strict = True
    assert audits.training(optimizer, net, trainer=trainer).ok
    huggingface = SimpleNamespace(args=SimpleNamespace(logging_nan_inf_filter=True))
    assert codes(audits.training(optimizer, net, trainer=huggingface)) == ["nan-loss-hidden"]


def test_batch_in_the_wrong_order_alike_or_of_other_items_is_reported():
    g = torch.Generator().manual_seed(0)
    references = torch.randn(4, 2, 2000, generator=g)
    mixture = references.sum(1)
    optimizer = SGD(model().parameters(), lr=1)
    assert audits.training(optimizer, batch=(mixture, references)).ok
    assert audits.training(optimizer, batch=(mixture[:, None], references)).ok
    assert codes(audits.training(optimizer, batch=(references, mixture))) == ["batch-order"]
    shifted = references.roll(1, 0)
    assert codes(audits.training(optimizer, batch=(mixture, shifted))) == ["batch-order"]
    nearly = mixture[:, None] + 0.05 * references
    assert codes(audits.training(optimizer, batch=(mixture, nearly))) == ["references-alike"]


def test_loss_on_the_batch_tells_its_sign_and_what_the_scheduler_will_see():
    g = torch.Generator().manual_seed(0)
    references = torch.randn(4, 2, 2000, generator=g)
    batch = (references.sum(1), references)
    optimizer = SGD(model().parameters(), lr=1)
    assert audits.training(optimizer, batch=batch, loss=pit_loss).ok
    wrong = audits.training(optimizer, batch=batch, loss=lambda e, r: -pit_loss(e, r))
    assert codes(wrong) == ["loss-sign"]
    found = audits.training(optimizer, scheduler=ReduceLROnPlateau(optimizer), batch=batch, loss=pit_loss)
    assert codes(found) == ["scheduler-negative-loss"]


def test_set_up_is_not_changed():
    net = model()
    optimizer = AdamW(net.parameters())
    scheduler = CosineAnnealingLR(optimizer, 5)
    batch = (torch.randn(2, 9), torch.randn(2, 2, 9))
    before, rng = str(optimizer.state_dict()) + str(scheduler.state_dict()), torch.random.get_rng_state()
    audits.training(optimizer, net, scheduler, batch=batch, loss=pit_loss)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert before == str(optimizer.state_dict()) + str(scheduler.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": [model()]}, TypeError, "not Sequential"),
        ({"loss_sign": "-"}, ValueError, "loss_sign must be"),
        ({"batch": (torch.zeros(2, 9), torch.zeros(2, 2, 8))}, ValueError, r"not \(2, 9\) and \(2, 2, 8\)"),
        ({"batch": (torch.zeros(2, 9),)}, ValueError, "two tensors"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        audits.training(**({"optimizer": SGD(model().parameters(), lr=1)} | arguments))
