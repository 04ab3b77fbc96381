"""An image classifier: convolutions, BatchNorm, ReLU in place, stochastic depth, squeeze and excitation."""

import torch
from torch import nn
from torch.nn import functional as F

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class DropPath(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x):
        alive = (torch.rand(len(x), 1, 1, 1) < self.keep).to(x)
        return x * (alive / self.keep)


class Excite(nn.Module):
    """Weighs channels by their spread over the image."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        spread = x.std(dim=(2, 3))
        return x * self.fc(spread).sigmoid()[:, :, None, None]


class Block(nn.Module):
    def __init__(self, channels, keep=1.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.excite = Excite(channels)
        self.path = DropPath(keep)

    def forward(self, x):
        return x + self.path(self.excite(self.act(self.norm(self.conv(x)))))


class Classifier(nn.Module):
    def __init__(self, keep=1.0, channels=6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(Block(channels, keep if i == 1 else 1.0) for i in range(2))
        self.head = nn.Linear(channels, 5)

    def forward(self, image):
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class Scaled(Classifier):
    """Scales each channel of the image to its own maximum, in place, one after the other."""

    def forward(self, image):
        image = image.clone()
        for channel in image.unbind(1):
            channel.div_(channel.amax(dim=(1, 2), keepdim=True))
        return super().forward(image)


def images(n=4):
    return torch.rand(n, 3, 8, 8)


def labelled(out):
    return F.cross_entropy(out, torch.arange(len(out)) % 5)


@fault("buffer", "blocks.0.norm", parameter="blocks.0.norm.running_var", first_nan="blocks.0.norm")
def running_variance_is_NaN_from_an_earlier_batch():
    model = Classifier().eval()
    model.blocks[0].norm.running_var[2] = nan
    return Run(model, (images(),))


@fault("operation|buffer", "blocks.1.norm", samples=(0, 1, 2, 3), first_nan="blocks.1.norm")
def running_variance_is_negative_after_a_bad_merge_of_checkpoints():
    model = Classifier().eval()
    model.blocks[1].norm.running_var[3] = -0.5
    return Run(model, (images(),))


@fault("parameter", "stem.0", parameter="stem.0.weight")
def exponent_bit_flip_spoils_the_running_variance_only():
    model = Classifier()
    weight = model.stem[0].weight.data.view(-1)
    weight[5] = 0.1
    weight.view(torch.int32)[5] ^= 1 << 30
    return Run(model, (images(),), loss=labelled)


@fault("operation", "", "div", "channel.div_", samples=(2,), first_inf="-", first_nan="")
def black_channel_scaled_in_place_through_a_view():
    x = images()
    x[2, 1] = 0
    return Run(Scaled().eval(), (x,))


@fault("operation", "blocks.1.path", "div", "alive / self.keep", call=0, first_inf="-", first_nan="blocks.1.path")
def stochastic_depth_that_keeps_nothing():
    return Run(Classifier(keep=0.0), (images(),), loss=labelled)


@fault("operation", "stem.0", "convolution|mkldnn_convolution|_slow_conv2d_forward", first_inf="stem.0")
def half_precision_convolution_overflows():
    model = Classifier().half().eval()
    model.stem[0].weight.data *= 100
    return Run(model, (images().half() * 60000,))


@fault("input", samples=(3,))
def one_NaN_pixel():
    x = images()
    x[3, 0, 4, 4] = nan
    return Run(Classifier().eval(), (x,))


@fault("input", samples=(1,))
def one_infinite_pixel_in_train_mode():
    x = images()
    x[1, 2, 0, 0] = inf
    return Run(Classifier(), (x,), loss=labelled)


@fault("loss", "", "log", "probability.log()")
def cross_entropy_by_hand_with_probabilities_that_underflow():
    model = Classifier().eval()
    model.head.bias.data[0] = 200

    def loss(out):
        probability = out.softmax(1)
        return -(F.one_hot(torch.zeros(4, dtype=torch.long), 5) * probability.log()).sum()

    return Run(model, (images(),), loss=loss)


class Rooted(Excite):
    def forward(self, x):
        spread = x.var(dim=(2, 3)).sqrt()
        return x * self.fc(spread).sigmoid()[:, :, None, None]


def dead(excite):
    """Every channel is constant."""
    model = Classifier().eval()
    model.blocks[0].norm.weight.data[:] = 0
    model.blocks[0].act = nn.Identity()
    model.blocks[0].excite = excite
    return model


@fault("backward", "blocks.0.excite", "sqrt", "x.var(dim=(2, 3)).sqrt()")
def root_of_the_variance_of_a_dead_layer():
    return Run(dead(Rooted(6)), (images(),), loss=lambda out: out.square().sum())


@healthy
def deviation_of_a_dead_layer_whose_slope_torch_sets_to_zero():
    return Run(dead(Excite(6)), (images(),), loss=labelled)


class Masked(Classifier):
    """Divides by a mask's area, and drops what an empty mask makes of it."""

    def forward(self, image, mask):
        area = mask.sum(dim=(1, 2))
        mean = (image * mask[:, None]).sum(dim=(2, 3)) / area[:, None]
        mean = torch.where(area[:, None] > 0, mean, 0)
        return super().forward(image - mean[:, :, None, None])


@healthy
def mean_over_an_empty_mask_removed_by_where():
    mask = (torch.rand(4, 8, 8) > 0.5).float()
    mask[1] = 0
    return Run(Masked(), (images(), mask), loss=labelled)


class Contrast(Classifier):
    def forward(self, image):
        ratio = image / image.amin(dim=(2, 3), keepdim=True)
        return super().forward(ratio.nan_to_num(nan=0.0, posinf=1.0).clamp(max=10))


@healthy
def ratios_cleaned_on_purpose():
    x = images()
    x[0, :, 0, 0] = 0
    return Run(Contrast(), (x,), loss=labelled)


@healthy
def an_empty_batch():
    return Run(Classifier().eval(), (images(0),), loss=lambda out: out.sum())


@healthy
def max_pooling_with_padding_of_minus_infinity():
    model = nn.Sequential(nn.ConstantPad2d(1, -inf), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    return Run(model, (images(),), loss=lambda out: out.mean())


@healthy
def stochastic_depth_in_training():
    return Run(Classifier(keep=0.5), (images(),), loss=labelled)
