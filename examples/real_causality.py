"""Audits modules of real speech packages that claim to be causal, and prints one row each.

Takes whatever of ESPnet (202412, before its guard), Asteroid, denoiser and encodec can be imported, and says what is
missing: `pip install --no-deps asteroid asteroid-filterbanks denoiser encodec espnet==202412` beside their own needs.
"""

from __future__ import annotations

import argparse
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from stethoscope.audits import causality

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Row(NamedTuple):
    """One module in one mode: what to build and what is true of it."""

    name: str
    build: Callable[[], tuple[Any, torch.Tensor]]
    mode: str
    lookahead: int  # WHOLE: everything
    culprit: str | None  # type of the guilty module
    options: Mapping[str, Any] = MappingProxyType({})


WHOLE = -1


def bsrnn(norm: str, steps: int = 120, num_channel: int = 8, num_layer: int = 2) -> tuple[nn.Module, torch.Tensor]:
    from espnet2.enh.layers.bsrnn import BSRNN

    return BSRNN(
        input_dim=481, num_channel=num_channel, num_layer=num_layer, target_fs=48000, causal=True, norm_type=norm
    ), torch.randn(2, steps, 481, 2)


def separator(norm: str) -> tuple[nn.Module, torch.Tensor]:
    from espnet2.enh.separator.bsrnn_separator import BSRNNSeparator

    model = BSRNNSeparator(
        input_dim=481, num_spk=1, num_channels=8, num_layers=2, target_fs=48000, causal=True, norm_type=norm
    )
    return model, torch.randn(2, 120, 481, dtype=torch.complex64)


def tdconvnet(norm: str | None) -> tuple[nn.Module, torch.Tensor]:
    from asteroid.masknn import TDConvNet

    options = {} if norm is None else {"norm_type": norm}
    return TDConvNet(
        16, 2, n_blocks=2, n_repeats=1, bn_chan=8, hid_chan=16, skip_chan=8, causal=True, **options
    ), torch.randn(2, 16, 200)


def convtasnet(norm: str) -> tuple[nn.Module, torch.Tensor]:
    from asteroid.models import ConvTasNet

    model = ConvTasNet(
        2,
        n_filters=16,
        kernel_size=16,
        stride=8,
        n_blocks=2,
        n_repeats=1,
        bn_chan=8,
        hid_chan=16,
        skip_chan=8,
        causal=True,
        norm_type=norm,
    )
    return model, torch.randn(2, 1600)


def demucs(*, normalize: bool) -> tuple[nn.Module, torch.Tensor]:
    from denoiser.demucs import Demucs

    return Demucs(hidden=8, depth=3, causal=True, normalize=normalize), torch.randn(2, 1, 2000)


def sconv(pad_mode: str) -> tuple[nn.Module, torch.Tensor]:
    from encodec.modules import SConv1d

    return SConv1d(2, 4, 7, causal=True, pad_mode=pad_mode), torch.randn(2, 2, 200)


def attention() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1))
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    return forward, torch.randn(2, 50, 16)


LENGTHS = {"time_axis": 1, "lengths": torch.tensor([120, 120])}
ROWS = [
    *(
        Row(f"ESPnet BSRNN {norm}", lambda norm=norm: bsrnn(norm), mode, ahead, culprit, {"time_axis": 1})
        for norm, mode, ahead, culprit in [
            ("GN", "eval", WHOLE, "GroupNorm"),
            ("GN", "train", WHOLE, "GroupNorm"),
            ("BN", "eval", 0, None),
            ("BN", "train", WHOLE, "BatchNorm1d"),
            ("cLN", "eval", 0, None),
            ("cLN", "train", 0, None),
            ("cfLN", "eval", 0, None),
            ("cfLN", "train", 0, None),
        ]
    ),
    Row("ESPnet BSRNNSeparator GN", lambda: separator("GN"), "eval", WHOLE, "GroupNorm", LENGTHS),
    Row("ESPnet BSRNNSeparator cLN", lambda: separator("cLN"), "eval", 0, None, LENGTHS),
    Row("Asteroid TDConvNet gLN (default)", lambda: tdconvnet(None), "eval", WHOLE, "GlobLN"),
    Row("Asteroid TDConvNet cLN", lambda: tdconvnet("cLN"), "eval", 0, None),
    Row("Asteroid ConvTasNet cLN, allowed 15", lambda: convtasnet("cLN"), "eval", 15, None, {"allowed": 15}),
    Row(
        "Asteroid ConvTasNet gLN (replaced by cLN), allowed 15",
        lambda: convtasnet("gLN"),
        "eval",
        15,
        None,
        {"allowed": 15},
    ),
    Row("denoiser Demucs normalize=True (default)", lambda: demucs(normalize=True), "eval", WHOLE, "Demucs"),
    Row("encodec SConv1d reflect (default)", lambda: sconv("reflect"), "eval", 6, "SConv1d"),
    Row("encodec SConv1d constant", lambda: sconv("constant"), "eval", 0, None),
    Row("MultiheadAttention, causal mask", attention, "eval", 0, None, {"time_axis": 1}),
]


def right(row: Row, report: Any, culprit: str | None, steps: int) -> bool:
    whole = report.lookahead >= 0.95 * (steps - 1)
    return (whole if row.lookahead == WHOLE else report.lookahead == row.lookahead) and culprit == row.culprit


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--long", action="store_true", help="also audit BSRNN on 1,000 frames and print the time")
    long = arguments.parse_args().long
    torch.set_num_threads(1)
    wrong = 0
    print(f"{'module':<42} {'mode':<6} {'ahead':>6} {'culprit':<34} {'size':>8} {'passes':>6} {'s':>5}  as known")
    for row in ROWS:
        torch.manual_seed(0)
        try:
            model, x = row.build()
        except ImportError as error:
            print(f"{row.name:<42} missing: {error}")
            continue
        start = time.perf_counter()
        report = causality(model, x, modes=(row.mode,), **row.options)
        verdict = report.per_mode[row.mode]
        kind = verdict.blame.type if verdict.blame is not None else None
        good = right(row, report, kind, report.steps)
        wrong += not good
        who = f"{report.culprit or 'root'} ({kind})" if kind else "-"
        print(
            f"{row.name:<42} {row.mode:<6} {report.lookahead:>6} {who:<34} {verdict.size:>8.1e} {report.passes:>6} "
            f"{time.perf_counter() - start:>5.1f}  {'yes' if good else 'NO'}"
        )
    if long:
        for norm in ("cLN", "GN"):
            model, x = bsrnn(norm, steps=1000, num_channel=16, num_layer=6)
            start = time.perf_counter()
            report = causality(model, x, time_axis=1)
            print(
                f"BSRNN {norm}, 1,000 frames: {time.perf_counter() - start:.1f} s, {report.passes} passes, look-ahead {report.lookahead}"
            )
    print(f"{wrong} rows differ from what is known.")


if __name__ == "__main__":
    main()
