"""Runs with nothing wrong, of what people train with pictures, each seen to get better by a metric of its own."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR

from faults import classifier, segmenter
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

# -- segmentation ----------------------------------------------------------------------------------------------------


@healthy
def plain_segmenter() -> Training:
    """A U-Net with BatchNorm, cross entropy and Dice, Adam; one pixel of 25 is foreground."""
    return segmenter.build(1)


@healthy
def focal_loss_on_pixels() -> Training:
    """A focal loss, GroupNorm and SiLU, a head that begins at the share of the rare class, AdamW and a cosine. Lin et al. 2017,
    arXiv:1708.02002."""
    t = segmenter.build(2, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU)
    with torch.no_grad():
        t.model.head.bias.copy_(torch.tensor([1.6, -1.6]))
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 250)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        each = F.cross_entropy(logits, batch[1], reduction="none")
        loss = ((1 - (-each).exp()).square() * each * torch.where(batch[1] == 1, 0.75, 0.25)).sum() / batch[
            1
        ].sum().clamp(min=1)
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


class Supervised(segmenter.UNet):
    """A second head at half the resolution, for the loss only."""

    def __init__(self) -> None:
        super().__init__(
            norm=lambda channels: nn.InstanceNorm2d(channels, affine=True), activation=lambda: nn.LeakyReLU(0.01)
        )
        self.coarse_head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.bottom(F.max_pool2d(coarse, 2))
        middle = self.up2(torch.cat([self.lift2(x), coarse], 1))
        x = self.up1(torch.cat([self.lift1(middle), fine], 1))
        return self.head(x), self.coarse_head(middle)


@healthy
def supervised_at_two_scales() -> Training:
    """InstanceNorm, leaky ReLU, SGD with Nesterov's momentum of 0.95, a rate that falls as a polynomial, clipping, and a second head
    in the loss, as in nnU-Net. Isensee et al. 2021."""
    t = segmenter.build(3)
    t.model, t.clip = Supervised(), 12.0
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.95, nesterov=True, weight_decay=3e-5)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: (1 - min(step, 249) / 250) ** 0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, coarse = model(batch[0])
        small = F.max_pool2d(batch[1][:, None].float(), 2)[:, 0].long()
        terms = [
            F.cross_entropy(given, wanted) + 1 - segmenter.dice(given, wanted).mean()
            for given, wanted in ((logits, batch[1]), (coarse, small))
        ]
        return {"loss": (terms[0] + 0.5 * terms[1]) / 1.5, "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def heat_map_of_a_point() -> Training:
    """A map with a bump at the one spot of each scan, by a squared error: nearly all of the targets are zero."""
    t = segmenter.build(4)
    data = {phase: segmenter.scans(n, n + 4, 1) for phase, n in (("train", 600), ("val", 100))}
    t.model.head = nn.Conv2d(8, 1, 1)

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randint(len(x), (16,), generator=seeded(81, step, len(phase)))
        y = F.avg_pool2d(F.avg_pool2d(y[chosen][:, None].float(), 5, 1, 2), 3, 1, 1)
        return segmenter.standardised(x[chosen]), y / y.amax((2, 3), keepdim=True)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": 20 * F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        best = tensors["outputs"].flatten(1).argmax(1)
        return {"hits": float((batch[1].flatten(1).gather(1, best[:, None]) > 0.5).float().mean())}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


@healthy
def noise_told_and_taken_away() -> Training:
    """A denoiser whose convolutions tell the noise, of a level that is drawn for each scan. Zhang et al. 2017, arXiv:1608.03981."""
    t = segmenter.build(5)
    layers = [segmenter.block(1, 16, lambda channels: nn.Identity(), nn.ReLU)]
    layers += [segmenter.block(16, 16, nn.BatchNorm2d, nn.ReLU) for _ in range(3)]
    t.model, plain = nn.Sequential(*layers, nn.Conv2d(16, 1, 3, padding=1)), t.sample

    def sample(step: int, phase: str) -> Batch:
        made = seeded(82, step, len(phase))
        clean = F.avg_pool2d(plain(step, phase)[0], 3, 1, 1)
        level = 0.3 + 0.7 * torch.rand(len(clean), 1, 1, 1, generator=made)
        return clean + level * torch.randn(clean.shape, generator=made), clean

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = batch[0] - model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        before, after = ((x - batch[1]).square().mean() for x in (batch[0], tensors["outputs"]))
        return {"gain_db": float(10 * torch.log10(before / after))}

    t.sample, t.forward, t.measure = sample, forward, measure
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)
    return t


# -- classification --------------------------------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """Two convolutions that make patches, a token for the class, two layers. Dosovitskiy et al. 2021, arXiv:2010.11929; Xiao et
    al. 2021, arXiv:2106.14881."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = classifier.block(1, 16, 1, nn.BatchNorm2d, nn.GELU)
        self.patches = nn.Conv2d(16, width, 3, 3)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 10, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classifier.CLASSES)

    def forward(self, x):
        x = self.patches(self.stem(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


@healthy
def patches_and_attention() -> Training:
    """A small vision transformer: AdamW, warm-up and cosine, dropout, clipping, smoothed labels."""
    t = classifier.build(81)
    t.model, t.clip, t.steps = VisionTransformer(), 1.0, 250
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    t.schedule = lambda optimizer: LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.5 + 0.5 * float(torch.tensor(3.14159 * step / 250).cos()))
    )

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], label_smoothing=0.05), "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def norms_kept_in_eval() -> Training:
    """A trained network gets a new head for another order of classes, at ten times the rate of the rest; all of it is tuned, while
    its BatchNorm layers keep their statistics and gains, as detectors do."""
    t = classifier.build(82)
    plain, optimizer = t.sample, torch.optim.Adam(t.model.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        t.forward(t.model, plain(50_000 + step, "train"))["loss"].backward()
        optimizer.step()
    t.model.zero_grad()
    t.model.head = nn.Linear(t.model.head.in_features, classifier.CLASSES)
    norms = [module for module in t.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.requires_grad_(False)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, (2 * y + 1) % classifier.CLASSES

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        for norm in norms:
            norm.eval()
        return classifier.forward(model, batch)

    def optimize(parameters):
        head = list(t.model.head.parameters())
        rest = [p for p in parameters if all(p is not h for h in head)]
        return torch.optim.SGD([{"params": rest}, {"params": head, "lr": 5e-3}], 5e-4, momentum=0.9, weight_decay=1e-4)

    t.sample, t.forward, t.optimize = sample, forward, optimize
    return t


class Angles(nn.Linear):
    """Cosines of features and classes."""

    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


@healthy
def margin_of_angles() -> Training:
    """Cosines times 16, less a margin of 0.2 for the true class: the loss stays above that of plain scores. Wang et al. 2018,
    arXiv:1801.05599."""
    t = classifier.build(83, activation=nn.PReLU)
    t.model.head = Angles(t.model.head.in_features, classifier.CLASSES, bias=False)
    t.optimize = lambda p: torch.optim.SGD(p, 0.03, momentum=0.9, weight_decay=5e-4)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        cosines = model(batch[0])
        logits = 16 * (cosines - 0.2 * F.one_hot(batch[1], classifier.CLASSES))
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": 16 * cosines, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def episodes_of_prototypes() -> Training:
    """Episodes of three classes out of twelve, three pictures of each to learn from and five to ask, by the distance to the mean.
    Snell et al. 2017, arXiv:1703.05175."""
    t = classifier.build(84)
    t.model.head = nn.Linear(t.model.head.in_features, 16)
    patterns = 1.8 * F.avg_pool2d(torch.randn(18, 1, 10, 10, generator=seeded(84)), 3, 1, 1)

    def sample(step: int, phase: str) -> Batch:
        made = seeded(84, step, len(phase))
        classes = (
            torch.randperm(12, generator=made)[:3] if phase == "train" else 12 + torch.randperm(6, generator=made)[:3]
        )
        x = patterns[classes].repeat_interleave(8, 0)
        return x + 0.8 * torch.randn(x.shape, generator=made), torch.arange(3).repeat_interleave(5)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        codes = model(batch[0]).view(3, 8, -1)
        logits = -torch.cdist(codes[:, 3:].flatten(0, 1), codes[:, :3].mean(1)).square() / 4
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)
    return t


class Mobile(nn.Module):
    """Expansion, a filter for each channel, a gate from the mean of each channel, and back. Howard et al. 2019,
    arXiv:1905.02244."""

    def __init__(self, channels: int, wide: int = 32) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.ReLU(), nn.Conv2d(8, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        wide = self.depth(self.expand(x))
        return x + self.project(wide * self.gate(wide))


@healthy
def depthwise_and_gated() -> Training:
    """Depthwise convolutions, gates of channels, hard activations, RMSprop with momentum, a rate that decays by the step."""
    t = classifier.build(85, activation=nn.Hardswish)
    t.model.block2, t.model.block3 = (
        nn.Sequential(t.model.block2, Mobile(16)),
        nn.Sequential(t.model.block3, Mobile(16)),
    )
    t.optimize = lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, eps=1e-3, weight_decay=1e-5)
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.995)
    return t


@healthy
def cut_from_another_picture() -> Training:
    """CutMix: a rectangle of another picture, labels by area; validation is of an average of the weights. Yun et al. 2019,
    arXiv:1905.04899."""
    t = classifier.build(86)
    plain = t.sample
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    average = copy.deepcopy(t.model)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        wanted = F.one_hot(y, classifier.CLASSES).float()
        if phase == "train" and step % 2:
            top, left, high, wide = torch.randint(1, 6, (4,), generator=seeded(86, step)).tolist()
            x[:, :, top : top + high, left : left + wide] = x.flip(0)[:, :, top : top + high, left : left + wide]
            wanted = torch.lerp(wanted, wanted.flip(0), high * wide / 100)
        return x, wanted

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
                mean.lerp_(now, 0.05) if mean.is_floating_point() else mean.copy_(now)

    def validate(training: Training, step: int, observer: Observer) -> None:
        own = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(average.state_dict())
        plain_validation(training, step, observer)
        training.model.load_state_dict(own)

    t.sample, t.forward, t.validate = sample, forward, validate
    t.measure = lambda tensors, batch: classifier.measure(tensors, (batch[0], batch[1].argmax(1)))
    t.after_step.append(follow)
    return t


class Larger(nn.Module):
    """Four times the pixels of a picture, by channels that are laid out as pixels. Shi et al. 2016, arXiv:1609.05158."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 4, 3, padding=1)
        self.activation, self.shuffle = nn.LeakyReLU(0.1), nn.PixelShuffle(2)

    def forward(self, x):
        features = self.activation(self.first(x))
        features = features + self.activation(self.second(features))
        return self.shuffle(self.third(features)) + F.interpolate(x, scale_factor=2, mode="bilinear")


@healthy
def larger_pictures_from_small() -> Training:
    """Super-resolution of scans from half their size: an absolute error, no normalisation, a rate that is halved twice."""
    t = segmenter.build(7)
    t.model, plain = Larger(), t.sample

    def sample(step: int, phase: str) -> Batch:
        large = F.avg_pool2d(plain(step, phase)[0], 3, 1, 1)
        return F.interpolate(large, scale_factor=0.5, mode="nearest"), large

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.l1_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        plain = F.interpolate(batch[0], scale_factor=2, mode="bilinear")
        before, after = ((x - batch[1]).square().mean() for x in (plain, tensors["outputs"]))
        return {"gain_db": float(10 * torch.log10(before / after))}

    t.sample, t.forward, t.measure = sample, forward, measure
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 0.5 ** (step // 100))
    return t
