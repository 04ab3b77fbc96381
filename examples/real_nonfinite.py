"""Seeds faults into models of real speech packages, asks `audits.nonfinite` for the culprit, and prints one row each.

Takes whatever of Asteroid, denoiser, encodec, ESPnet, SpeechBrain and transformers can be imported, and says what is missing. BEATs
(microsoft/unilm#1569, #1672) is no package: `git clone https://github.com/microsoft/unilm`, then `--beats unilm/beats` (for
tests the environment variable BEATS); it needs torchaudio.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from stethoscope.audits import nonfinite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NAN = float("nan")


class Run(NamedTuple):
    """What to audit: the arguments of `nonfinite`, and where."""

    model: nn.Module
    args: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    context: AbstractContextManager[Any] = nullcontext()


class Batch(NamedTuple):
    """What BEATs is called with, to be spoiled."""

    model: Any
    clips: torch.Tensor
    padding: torch.Tensor


class Row(NamedTuple):
    """A run, and what is true of it: attributes of the report, `source` as a part of it. Nothing: healthy."""

    name: str
    build: Callable[[], Run]
    truth: Mapping[str, Any] = MappingProxyType({})


def beats(level: float = 0.1, *, dtype: torch.dtype | None = None, spoil: Callable[[Batch], None] | None = None) -> Run:
    """Two clips of half a second through a small BEATs."""
    sys.path.insert(0, os.environ.get("BEATS", "beats"))
    try:
        from BEATs import BEATs, BEATsConfig
    finally:
        del sys.path[0]
    sizes = {"input_patch_size": 16, "embed_dim": 32, "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 64}
    heads = {"encoder_layers": 2, "encoder_attention_heads": 4, "conv_pos": 16, "conv_pos_groups": 4, "deep_norm": True}
    positions = {"relative_position_embedding": True, "num_buckets": 32, "max_distance": 80, "gru_rel_pos": True}
    model = BEATs(BEATsConfig({**sizes, **heads, **positions})).eval()
    clips, padding = torch.randn(2, 8000) * level, torch.zeros(2, 8000, dtype=torch.bool)
    if spoil is not None:
        spoil(Batch(model, clips, padding))
    context = torch.autocast("cpu", dtype) if dtype is not None else nullcontext()
    return Run(model, (clips,), {"padding_mask": padding, "forward": "extract_features"}, context)


def one_clip_is_padding(batch: Batch) -> None:
    batch.padding[1] = True


def absurd_weight(batch: Batch) -> None:
    batch.model.encoder.layers[1].fc1.weight.data[3, 4] = 3e38


def broken_clip(batch: Batch) -> None:
    batch.clips[1, 4000] = NAN


def dprnn(*, spoil: bool) -> Run:
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import DPRNNTasNet

    model = DPRNNTasNet(2, n_filters=16, kernel_size=8, stride=4, bn_chan=8, hid_size=8, chunk_size=10, n_repeats=2)
    if spoil:
        model.masker.net[1].inter_RNN.rnn.weight_hh_l0_reverse.data[3, 2] = NAN
    sources = torch.randn(2, 2, 400)
    sources[1, 1] = 0
    loss = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    return Run(model, (sources.sum(1),), {"loss": lambda out: loss(out, sources)})


def clustering() -> Run:
    from asteroid.losses import deep_clustering_loss

    audible, speaker = torch.zeros(2, 10, 1, dtype=torch.bool), torch.arange(20).view(2, 10, 1) % 2
    audible[0] = True
    return Run(
        nn.Linear(5, 20),
        (torch.randn(2, 10, 5),),
        {"loss": lambda out: deep_clustering_loss(out, speaker, binary_mask=audible).mean()},
    )


def demucs() -> Run:
    from denoiser.demucs import Demucs

    return Run(Demucs(hidden=4, depth=3), (torch.zeros(2, 1, 2000),), {"loss": lambda out: out.square().mean()})


def codec(*, spoil: bool) -> Run:
    from encodec.modules import SEANetEncoder

    model = SEANetEncoder(channels=1, dimension=8, n_filters=2, ratios=[4, 2])
    if spoil:
        model.model[3].conv.conv.weight_g.data[1] = NAN
    return Run(model, (torch.randn(2, 1, 400),), {"loss": lambda out: out.square().mean()})


def pit() -> Run:
    from speechbrain.nnet.losses import get_si_snr_with_pitwrapper

    sources = torch.randn(2, 400, 2)
    sources[1, :, 0] = 0
    return Run(
        nn.Linear(400, 400),
        (sources.transpose(1, 2),),
        {"loss": lambda out: get_si_snr_with_pitwrapper(sources, out.transpose(1, 2)).mean()},
    )


def bsrnn() -> Run:
    from espnet2.enh.layers.bsrnn import BSRNN

    model = BSRNN(input_dim=481, num_channel=4, num_layer=1, target_fs=48000, norm_type="GN")
    model.band_split.norm[2].bias.data[5] = NAN
    return Run(model, (torch.randn(2, 12, 481, 2),))


def magnitude(eps: float) -> Run:
    from speechbrain.processing.features import spectral_magnitude

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(9, 18)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return spectral_magnitude(self.inp(x).unflatten(-1, (9, 2)), power=0.5, eps=eps)

    model = Features()
    model.inp.bias.data.zero_()
    x = torch.randn(2, 6, 9)
    x[1, 2] = 0
    return Run(model, (x,), {"loss": lambda out: out.mean()})


WORDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> Run:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    model.transformer.wte.weight.data[3, 2] = NAN  # the head shares it, and word 3 does not occur
    words = torch.randint(4, 50, (2, 8))
    return Run(model, (words,), {"labels": words, "loss": lambda out: out.loss})


def llama(attention: str) -> Run:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**WORDS, **layers, intermediate_size=32, attn_implementation=attention))
    words, there = torch.randint(4, 50, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    there[0, :3], there[1] = 0, 0
    return Run(model, (words,), {"attention_mask": there, "labels": words, "loss": lambda out: out.loss})


def t5() -> Run:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**WORDS, **sizes, decoder_start_token_id=0)).eval().half()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.data[:] = 30000
    words = torch.randint(4, 50, (2, 8))
    return Run(model, (), {"input_ids": words, "labels": words})


def bert() -> Run:
    from transformers import BertConfig, BertForMaskedLM

    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(**WORDS, **layers))
    labels = torch.full((2, 8), -100)
    return Run(model, (torch.randint(4, 50, (2, 8)),), {"labels": labels, "loss": lambda out: out.loss})


# autocast casts the power spectrum for the matrix product, and the cast is the first that half precision cannot hold
FBANK = {"origin": "operation", "module": "", "operation": "aten._to_copy", "source": "torch.mm("}
ROWS = [
    Row("BEATs, fp16 autocast", lambda: beats(dtype=torch.float16), FBANK),
    Row("BEATs, fp16 autocast, rms 1e-3", lambda: beats(1e-3, dtype=torch.float16), FBANK),
    Row("BEATs, fp16 autocast, rms 1e-5", lambda: beats(1e-5, dtype=torch.float16)),
    Row("BEATs, bf16 autocast", lambda: beats(dtype=torch.bfloat16)),
    Row("BEATs, silence", lambda: beats(0.0)),
    Row(
        "BEATs, one clip is padding",
        lambda: beats(spoil=one_clip_is_padding),
        {"origin": "operation", "module": "encoder.layers.0.self_attn", "operation": "aten._softmax", "samples": (1,)},
    ),
    Row(
        "BEATs, one weight of 3e38",
        lambda: beats(spoil=absurd_weight),
        {"origin": "parameter", "parameter": "encoder.layers.1.fc1.weight"},
    ),
    Row("BEATs, NaN in one clip", lambda: beats(spoil=broken_clip), {"origin": "input", "samples": (1,)}),
    Row("Asteroid DPRNNTasNet, a silent source", lambda: dprnn(spoil=False)),
    Row(
        "Asteroid DPRNNTasNet, NaN in a recurrent weight",
        lambda: dprnn(spoil=True),
        {"origin": "parameter", "parameter": "masker.net.1.inter_RNN.rnn.weight_hh_l0_reverse"},
    ),
    Row(
        "Asteroid deep clustering, nothing audible in a clip",
        clustering,
        {"origin": "loss", "operation": "aten.div", "source": "torch.sum(binary_mask"},
    ),
    Row("denoiser Demucs, silence", demucs),
    Row("encodec encoder", lambda: codec(spoil=False)),
    Row(
        "encodec encoder, NaN in a weight norm's gain",
        lambda: codec(spoil=True),
        {"origin": "parameter", "parameter": "model.3.conv.conv.weight_g"},
    ),
    Row(
        "transformers GPT-2, NaN in the tied weight",
        gpt2,
        {"origin": "parameter", "parameter": "transformer.wte.weight", "first_inf": None},
    ),
    Row("transformers Llama, one text is padding, eager", lambda: llama("eager")),
    Row("transformers Llama, one text is padding, sdpa", lambda: llama("sdpa")),
    Row("transformers T5, fp16, clamps its overflow", t5),
    Row(
        "transformers BERT, no label at all",
        bert,
        {"origin": "operation", "operation": "aten.nll_loss_forward", "source": "loss_fct("},
    ),
    Row("SpeechBrain SI-SNR with PIT, a silent source", pit),
    Row(
        "ESPnet BSRNN, NaN in the norm of a band",
        bsrnn,
        {"origin": "parameter", "module": "band_split.norm.2", "parameter": "band_split.norm.2.bias"},
    ),
    Row("SpeechBrain spectral_magnitude, a silent frame", lambda: magnitude(1e-14)),
    Row(
        "SpeechBrain spectral_magnitude without eps",
        lambda: magnitude(0.0),
        {"origin": "backward", "operation": "aten.pow", "source": "features.py"},
    ),
]


def audit(row: Row) -> Any:
    """The report on a row.

    Raises:
        ImportError: its package is not there.
    """
    torch.manual_seed(0)
    run = row.build()
    with run.context:
        return nonfinite(run.model, *run.args, **run.options)


def right(row: Row, report: Any) -> bool:
    if not row.truth:
        return not report.findings
    truth = dict(row.truth)
    part = truth.pop("source", "")
    return part in (report.source or "") and all(getattr(report, name) == value for name, value in truth.items())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--beats", metavar="DIR", help="folder of BEATs.py")
    directory = arguments.parse_args().beats
    if directory:
        os.environ["BEATS"] = directory
    torch.set_num_threads(1)
    wrong = 0
    print(f"{'case':<50} {'origin':<10} {'operation':<16} {'culprit':<48} {'s':>5}  as known")
    for row in ROWS:
        start = time.perf_counter()
        try:
            report = audit(row)
        except ImportError as error:
            print(f"{row.name:<50} missing: {error}")
            continue
        good = right(row, report)
        wrong += not good
        culprit = report.parameter or report.module or (report.source or "").rpartition("/")[2]
        print(
            f"{row.name:<50} {report.origin or '-':<10} {report.operation or '-':<16} {culprit[:48]:<48} "
            f"{time.perf_counter() - start:>5.1f}  {'yes' if good else 'NO'}"
        )
    print(f"{wrong} rows differ from what is known.")


if __name__ == "__main__":
    main()
