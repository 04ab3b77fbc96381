"""Healthy runs of sequences: transducers, attention, other cells, likelihoods, states that are kept, parts that rest."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributions import NegativeBinomial
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from faults import forecaster, recogniser
from faults._fault import healthy
from faults._training import Batch, Tensors, Training, seeded

# -- recognisers -----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(recogniser.FEATURES, 32, 3, 2, padding=1)
        self.norm = nn.LayerNorm(32)
        self.gru = nn.GRU(32, 24, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.gru(self.norm(F.silu(self.conv(x.transpose(1, 2))).transpose(1, 2)))[0]


class Transducer(nn.Module):
    """Frames and symbols so far, each by a recurrent network, joined for the next symbol. Graves 2012, arXiv:1211.3711."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.embedding = nn.Embedding(recogniser.SYMBOLS, 12)
        self.predictor = nn.GRU(12, width, batch_first=True)
        self.frames, self.symbols = nn.Linear(48, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, recogniser.SYMBOLS)

    def forward(self, x, labels):
        frames = self.frames(self.encoder(x))
        symbols = self.symbols(self.predictor(self.embedding(F.pad(labels, (1, 0))))[0])
        return self.head(torch.tanh(frames[:, :, None] + symbols[:, None])).log_softmax(-1)


def over_all_paths(scores: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Minus the logarithm of the sum over all alignments, per utterance, of (batch, frames, symbols + 1, vocabulary)."""
    blank = scores[..., 0]
    emitted = scores[:, :, :-1].gather(-1, labels[:, None, :, None].expand(-1, scores.shape[1], -1, 1))[..., 0]
    so_far = F.pad(emitted.cumsum(-1), (1, 0))
    alpha = so_far[:, 0]
    for frame in range(1, scores.shape[1]):
        alpha = so_far[:, frame] + torch.logcumsumexp(alpha + blank[:, frame - 1] - so_far[:, frame], 1)
    return -(alpha + blank[:, -1]).gather(1, lengths[:, None])[:, 0]


@healthy
def transducer() -> Training:
    """A transducer: the sum over all alignments, a predictor that knows the labels, Adam and warm-up."""
    t = recogniser.build(81)
    t.model = Transducer()
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        scores = model(batch[0], batch[1])
        return {"loss": over_all_paths(scores, *batch[1:]).mean(), "scores": scores}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        """Share of symbols that are the best one at the frame where they are the most likely."""
        right = []
        for scores, labels, length in zip(tensors["scores"], *batch[1:], strict=True):
            for place in range(int(length)):
                frame = scores[:, place, labels[place]].argmax()
                right.append(float(scores[frame, place, 1:].argmax() + 1 == labels[place]))
        return {"accuracy": sum(right) / len(right)}

    t.forward, t.measure = forward, measure
    return t


class Listener(nn.Module):
    """Writes symbol by symbol, and looks at all frames for each. Chan et al. 2015, arXiv:1508.01211."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.positions = nn.Parameter(0.3 * torch.randn(22, 48))
        self.embedding = nn.Embedding(recogniser.SYMBOLS, 16)
        self.cell = nn.GRUCell(16 + 48, width)
        self.query = nn.Linear(width, 48)
        self.head = nn.Linear(width + 48, recogniser.SYMBOLS)

    def forward(self, x, labels):
        frames = self.encoder(x) + self.positions
        state, seen, logits = frames.new_zeros(len(x), 48), frames.mean(1), []
        for symbols in self.embedding(F.pad(labels, (1, 0))).unbind(1):
            state = self.cell(torch.cat([symbols, seen], -1), state)
            weights = (frames @ self.query(state)[..., None] / math.sqrt(48)).softmax(1)
            seen = (weights * frames).sum(1)
            logits.append(self.head(torch.cat([state, seen], -1)))
        return torch.stack(logits, 1)


@healthy
def listen_and_spell() -> Training:
    """An attention decoder with teacher forcing, label smoothing, an end symbol, and positions behind it that are not scored."""
    t = recogniser.build(82)
    t.model = Listener()
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 30, (300 - step) / 270))

    def targets(batch: Batch) -> torch.Tensor:
        place = torch.arange(7)
        return F.pad(batch[1], (0, 1)).where(place < batch[2][:, None], 0).where(place <= batch[2][:, None], -100)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0], batch[1])
        loss = F.cross_entropy(logits.transpose(1, 2), targets(batch), label_smoothing=0.1)
        return {"loss": loss, "logits": logits, "targets": targets(batch)}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        scored = tensors["targets"] >= 0
        return {"accuracy": float((tensors["logits"].argmax(-1) == tensors["targets"])[scored].float().mean())}

    t.forward, t.measure = forward, measure
    return t


class Dilated(nn.Module):
    def __init__(self, dilation: int, width: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


class TimeDelays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(recogniser.FEATURES, 32, 5, 2, padding=2)
        self.layers = nn.Sequential(*(Dilated(dilation) for dilation in (1, 2, 4)))
        self.head = nn.Conv1d(32, recogniser.SYMBOLS, 1)

    def forward(self, x):
        return self.head(self.layers(self.front(x.transpose(1, 2)))).transpose(1, 2)


@healthy
def time_delays_with_sgd() -> Training:
    """Dilated convolutions with BatchNorm in place of the recurrence, SGD with Nesterov momentum, one cycle."""
    t = recogniser.build(83)
    t.model = TimeDelays()
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=300)
    return t


class Streaming(recogniser.Recogniser):
    """An LSTM that looks back only, with a projection. Sak et al. 2014, arXiv:1402.1128."""

    def __init__(self) -> None:
        super().__init__(activation=nn.GELU)
        self.gru = nn.LSTM(32, 64, proj_size=24, batch_first=True)
        self.head = nn.Linear(24, recogniser.SYMBOLS)


@healthy
def streaming_with_a_projection() -> Training:
    """An LSTM that looks back only, with a projection of its state, RAdam without clipping."""
    t = recogniser.build(84)
    t.model, t.clip, t.steps = Streaming(), None, 350
    t.optimize = lambda p: torch.optim.RAdam(p, 5e-3)
    return t


@healthy
def fine_tuned_to_other_symbols() -> Training:
    """Trained for one set of symbols, then for another: a new head, a frozen convolution, a recurrence at a fifth of the rate."""
    old = recogniser.build(85)
    optimizer = old.optimize(old.model.parameters())
    for step in range(220):
        optimizer.zero_grad()
        old.forward(old.model, old.sample(step, "train"))["loss"].backward()
        optimizer.step()
    t = recogniser.build(86)
    t.model, plain = old.model, old.sample
    t.model.head.reset_parameters()
    t.model.zero_grad()
    t.model.conv.requires_grad_(False)
    others = torch.tensor([0, 3, 5, 1, 2, 4])

    def sample(step: int, phase: str) -> Batch:
        x, labels, lengths = plain(step + 1000, phase)
        return x, others[labels], lengths

    t.sample, t.steps = sample, 200
    slow = [*t.model.norm.parameters(), *t.model.gru.parameters()]
    t.optimizers = [torch.optim.AdamW([{"params": slow, "lr": 1e-3}, {"params": t.model.head.parameters()}], 5e-3)]
    return t


# -- forecasters -----------------------------------------------------------------------------------------------------


class Mixture(forecaster.Forecaster):
    """Three Gaussians over the next hours. Bishop 1994."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3 * (1 + 2 * forecaster.HORIZON))

    def forward(self, x):
        weights, means, scales = super().forward(x).unflatten(-1, (3, -1)).split([1, forecaster.HORIZON, forecaster.HORIZON], -1)  # fmt: skip
        return weights[..., 0].log_softmax(-1), means, F.softplus(scales) + 0.05


@healthy
def mixture_of_three() -> Training:
    """A mixture density: minus the logarithm of a sum of three likelihoods, AdamW, mild weight decay."""
    t = forecaster.build(81)
    t.model, t.steps, t.clip = Mixture(), 400, 20.0
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=1e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        weights, means, scales = model(batch[0])
        each = torch.distributions.Normal(means, scales).log_prob(batch[1][:, None]).sum(-1)
        outputs = (weights.exp()[..., None] * means).sum(1)
        return {"loss": -(weights + each).logsumexp(-1).mean(), "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t


class HourByHour(nn.Module):
    """A decoder that is given the last hour: the true one by chance, its own otherwise. Bengio et al. 2015, arXiv:1506.03099."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.LSTM(forecaster.FEATURES, width, batch_first=True)
        self.decoder = nn.LSTMCell(1, width)
        self.head = nn.Linear(width, 1)
        self.forced = 1.0

    def forward(self, x, y):
        state = tuple(part[0] for part in self.encoder(x)[1])
        value, outputs = x[:, -1, :1], []
        for hour in range(forecaster.HORIZON):
            state = self.decoder(value, state)
            outputs.append(value + self.head(state[0]))
            teach = self.training and torch.rand(()) < self.forced
            value = y[:, hour : hour + 1] if teach else outputs[-1].detach() if self.training else outputs[-1]
        return torch.cat(outputs, 1)


@healthy
def scheduled_sampling() -> Training:
    """Teacher forcing that becomes rarer, from four hours of five to two of five; an absolute error."""
    t = forecaster.build(82)
    t.model, t.steps = HourByHour(), 400
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)

    def rarer(training: Training, step: int) -> None:
        training.model.forced = max(0.4, 0.8 - step / 500)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0], batch[1])
        return {"loss": F.l1_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.before.append(rarer)
    t.forward = forward
    return t


class Stateful(nn.Module):
    """Goes on, in training, where the batch before has ended."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 1)
        self.state: torch.Tensor | None = None

    def forward(self, x, first):
        before = None if first or not self.training else self.state
        states, state = self.gru(x, before)
        if self.training:
            self.state = state.detach()
        return self.head(states)[..., 0]


@healthy
def state_kept_over_batches() -> Training:
    """Truncated backpropagation: 24 hours at a time of the same 32 series, the state handed on and detached; after 120 hours new
    series. Neighbouring batches are alike."""
    t = forecaster.build(83)
    data = {"train": forecaster.series(640, seeded(83), 121), "val": forecaster.series(64, seeded(84), 121)}

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            rows = data[phase][32 * (step % 2) :][:32]
            return rows[:, :-1, None], rows[:, 1:], torch.tensor(True)
        start = step % 5 * 24
        rows = data[phase][step // 5 % 20 * 32 :][:32, start : start + 25]
        return rows[:, :-1, None], rows[:, 1:], torch.tensor(start == 0)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0], bool(batch[2]))
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error, naive = ((guess - batch[1])[:, 24:].abs().mean() for guess in (tensors["outputs"], batch[0][..., 0]))
        return {"mae": float(error), "skill": float(1 - error / naive)}

    t.model, t.sample, t.forward, t.measure = Stateful(), sample, forward, measure
    return t


@healthy
def counts_with_many_zeros() -> Training:
    """Counts, a third of them zero and some above thirty: a negative binomial likelihood, its mean by a softplus. Salinas et al.
    2017, arXiv:1704.04110."""
    t = forecaster.build(84)
    plain, t.steps = t.sample, 400
    t.model.head = nn.Linear(24, 2 * forecaster.HORIZON)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        both = torch.poisson((1.3 * torch.cat([x[..., 0], y], 1)).exp(), generator=seeded(84, step, len(phase)))
        return torch.cat([both[:, : forecaster.PAST, None].log1p(), x[..., 1:]], -1), both[:, forecaster.PAST :]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        mean, spread = (F.softplus(part) + 1e-3 for part in model(batch[0]).chunk(2, -1))
        loss = -NegativeBinomial(1 / spread, logits=(mean * spread).log()).log_prob(batch[1]).mean()
        return {"loss": loss, "outputs": mean, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error = (tensors["outputs"] - batch[1]).abs().mean()
        return {"mae": float(error), "skill": float(1 - error / (batch[1].mean() - batch[1]).abs().mean())}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


class Reservoir(nn.Module):
    """A random recurrence with a radius below one that is never trained, and a readout. Jaeger 2001."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.rnn = nn.RNN(forecaster.FEATURES, width, batch_first=True).requires_grad_(False)
        with torch.no_grad():
            weight = torch.randn(width, width) * (torch.rand(width, width) < 0.1)
            self.rnn.weight_hh_l0.copy_(0.9 * weight / torch.linalg.eigvals(weight).abs().max())
        self.head = nn.Linear(width, forecaster.HORIZON)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0])


@healthy
def echo_state() -> Training:
    """A reservoir: nine of ten recurrent weights are zero, none is trained; the readout is, by Adam with weight decay."""
    t = forecaster.build(85)
    t.model, t.clip = Reservoir(), None
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.01)
    return t


class MinimalGate(nn.Module):
    """A gate and a candidate that do not look at the state. Feng et al. 2024, arXiv:2410.01201."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.candidate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x):
        normed = self.norm(x)
        gates, new = self.gate(normed).sigmoid(), self.candidate(normed)
        state, states = torch.zeros_like(new[:, 0]), []
        for gate, value in zip(gates.unbind(1), new.unbind(1), strict=True):
            state = state + gate * (value - state)
            states.append(state)
        return x + torch.stack(states, 1)


@healthy
def minimal_gates() -> Training:
    """Two minimal recurrent layers around which inputs are added, a head that starts at zero, to which the last value is added,
    NAdam, and a Huber loss."""
    t = forecaster.build(86)
    layers = [nn.Linear(forecaster.FEATURES, 32), MinimalGate(), MinimalGate(), nn.RMSNorm(32)]
    t.model = nn.Sequential(*layers, nn.Linear(32, forecaster.HORIZON))
    nn.init.zeros_(t.model[-1].weight)
    t.optimize = lambda p: torch.optim.NAdam(p, 4e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])[:, -1] + batch[0][:, -1:, 0]
        return {"loss": F.huber_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t
