from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stethoscope.probes import LossInputs
from stethoscope.probes._loss_inputs import LAYER, LOG_SOFTMAX, OTHER, OTHER_AXIS, RELU, SIGMOID, SOFTMAX, TANH
from stethoscope.testing import assert_no_sync

LABELS = torch.tensor([0, 1, 2, 1])


def told(loss, model=None, x=None):
    model = nn.Linear(6, 3) if model is None else model
    attached = LossInputs().attach(model)
    attached.arm(True, "train")
    x = torch.randn(4, 6) if x is None else x
    given = {"loss": loss(model(x))}
    found = {(key.name, key.module): float(value) for key, value in attached.read(given).items()}
    attached.detach()
    assert found.pop(("loss/terms", "")) == len(found)
    return found


@pytest.mark.parametrize(
    ("activate", "form"),
    [
        (lambda z: z, LAYER),
        (lambda z: z.softmax(-1), SOFTMAX),
        (lambda z: z.log_softmax(-1), LOG_SOFTMAX),
        (torch.sigmoid, SIGMOID),
        (torch.relu, RELU),
        (torch.tanh, TANH),
        (lambda z: 10 * torch.tanh(z), OTHER),
        (lambda z: z.softmax(-1).log(), OTHER),
    ],
)
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, LABELS),
        lambda z: F.cross_entropy(z, LABELS, weight=torch.ones(3), label_smoothing=0.1),
        lambda z: F.cross_entropy(z, torch.eye(3)[LABELS]),
        lambda z: 0.3 * F.cross_entropy(z[None].squeeze(0).double(), LABELS, reduction="none").mean() + 1,
        lambda z: F.nll_loss(z.log_softmax(1), LABELS),
    ],
)
def test_a_cross_entropy_says_what_was_before_its_softmax(loss, activate, form):
    assert told(lambda z: loss(activate(z))) == {("loss/cross_entropy_input", ""): form}


@pytest.mark.parametrize(("activate", "form"), [(lambda z: z, LAYER), (torch.sigmoid, SIGMOID), (torch.relu, RELU)])
def test_a_binary_cross_entropy_with_logits_does_too(activate, form):
    loss = lambda z: F.binary_cross_entropy_with_logits(activate(z)[:, 0], torch.ones(4))  # noqa: E731
    assert told(loss) == {("loss/bce_input", ""): form}


@pytest.mark.parametrize(
    ("activate", "form"),
    [(lambda z: z, LAYER), (lambda z: z.softmax(1), SOFTMAX), (lambda z: z.log_softmax(0), OTHER_AXIS)],
)
def test_a_log_loss_wants_logarithms_over_the_classes(activate, form):
    assert told(lambda z: F.nll_loss(activate(z), LABELS)) == {("loss/nll_input", ""): form}


@pytest.mark.parametrize(
    ("activate", "form"),
    [
        (lambda z: z.log_softmax(-1).transpose(0, 1), LOG_SOFTMAX),
        (lambda z: z.permute(1, 0, 2).log_softmax(2), LOG_SOFTMAX),
        (lambda z: z.log_softmax(1).transpose(0, 1), OTHER_AXIS),
        (lambda z: z.log_softmax(1).permute(1, 0, 2), OTHER_AXIS),
        (lambda z: z.softmax(-1).transpose(0, 1), SOFTMAX),
        (lambda z: z.transpose(0, 1), LAYER),
    ],
)
def test_axes_are_followed_through_transposed_tensors(activate, form):
    def loss(z):
        frames, lengths = torch.full((4,), 9), torch.full((4,), 2)
        return F.ctc_loss(activate(z), torch.ones(4, 2, dtype=torch.long), frames, lengths)

    assert told(loss, nn.Linear(6, 5), torch.randn(4, 9, 6)) == {("loss/ctc_input", ""): form}


def test_a_linear_whose_input_is_not_contiguous_is_a_layer_and_another_sum_is_not():
    class Recogniser(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.gru(x)[0])

    def loss(z):
        frames, lengths = torch.full((4,), 9), torch.full((4,), 2)
        return F.ctc_loss(z.transpose(0, 1), torch.ones(4, 2, dtype=torch.long), frames, lengths)

    assert told(loss, Recogniser(), torch.randn(4, 9, 6)) == {("loss/ctc_input", ""): LAYER}
    bias = nn.Parameter(torch.zeros(5))
    assert told(lambda z: loss(z.tanh() + bias), Recogniser(), torch.randn(4, 9, 6)) == {("loss/ctc_input", ""): OTHER}


def test_the_innermost_module_that_returned_it_is_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Sequential(nn.Linear(8, 3), nn.Softmax(-1)))
    assert told(lambda z: F.cross_entropy(z, LABELS), model) == {("loss/cross_entropy_input", "2.1"): SOFTMAX}
    assert "stethoscope" not in str(copy.deepcopy(model).__dict__)


def test_an_attention_and_other_losses_are_no_term():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head((self.q(x) @ x.T).softmax(-1) @ x)

    assert told(lambda z: z.square().mean(), Attentive()) == {}
    assert told(lambda z: F.cross_entropy(z, LABELS), Attentive()) == {("loss/cross_entropy_input", ""): LAYER}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_and_autocast_do_no_harm(reentrant):
    inner = nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    found = told(lambda z: F.cross_entropy(z.float(), LABELS), Outer())
    assert list(found.values()) == [OTHER if reentrant else SOFTMAX]


def test_without_a_graph_nothing_is_read_and_in_other_phases_nothing_is_hooked():
    model = nn.Linear(6, 3)
    attached = LossInputs().attach(model)
    attached.arm(True, "val")
    assert not model._forward_hooks
    attached.arm(True, "train")
    assert len(attached.read({"loss": torch.zeros(())})) == 0


def test_targets_do_not_wait_for_the_device():
    outputs = torch.randn(8, requires_grad=True).sigmoid()
    given = {"outputs": outputs, "targets": torch.randn(8), "loss": (outputs - 1).square().mean()}
    assert_no_sync(LossInputs(), nn.Linear(3, 3), torch.randn(4, 3), given)
