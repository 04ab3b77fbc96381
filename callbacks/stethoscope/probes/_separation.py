"""`Separation`: how far apart the outputs of a separator are, and how well they match the references."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stethoscope import separation_stats as stats
from stethoscope._protocols import Attachment, Key, Probe
from stethoscope._record import Finding
from stethoscope.probes._signals import LayoutError, SignalBatch, find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

SLOTS = 65_536
"""Sample ids whose last assignment is remembered, per phase."""


@dataclass(frozen=True)
class Separation:
    """Measures the outputs of a separation (or enhancement) model that are given to the monitor; no hooks.

    **Records**, means over the finite items of the batch unless said otherwise; `abs(cos)` of masked, mean-free signals:

    | `separation/...` | meaning, unit |
    |---|---|
    | `out_cos`, `ref_cos` | largest abs(cos) over pairs of outputs (within 40 dB of the loudest), of references |
    | `out_delay_cos`, `ref_delay_cos` | the same, over delays up to `max_delay` samples |
    | `mix_cos` | smallest abs(cos) of an output with the mixture: near 1 means that all repeat it |
    | `level_db`, `ref_level_db` | level of the quietest output, reference, dB re 1 |
    | `alike_fraction`, `quiet_fraction`, `copy_fraction` | share of finite items: outputs alike, one silent, all mixture |
    | `nonfinite_fraction` | share of items with NaN or Inf in an output |
    | `unrelated_fraction`, `misplaced_fraction` | share of mixtures unrelated to the sum of their references; of these, share that another item's fits |
    | `batch_cos`, `mix_batch_cos` | one output only: abs(cos) with the next item's output, mixture |
    | `si_sdr_db`, `worst_si_sdr_db`, `si_sdri_db` | SI-SDR of the best assignment, of its worst source, improvement, dB |
    | `source<i>_si_sdr_db` | SI-SDR of reference i, dB |
    | `margin_db` | median over items: best less second-best assignment, dB (or the unit of `pairwise`) |
    | `flips`, `revisits` | share and number of items that came back and were assigned differently, by `ids` |
    | `sir_db`, `sar_db`, `source<i>_...` | outside training: scale-invariant SIR and SAR, all and per reference, dB |

    Layouts: (B, S, T) (Asteroid), (B, T, S) with `source_axis=2` (SpeechBrain), a list of (B, T) tensors or of complex
    spectra (B, frames, bins) (ESPnet), (B, T) for one output. Integer, half and complex are read as float32. Where
    estimates and references differ in length or number, the common part counts. With
    `torch.backends.cuda.matmul.fp32_precision = "tf32"` SI-SDR above about 25 dB is inexact.

    **Cost** (batch 8, 2 sources, 4 s at 8 kHz, one core): see `tests/benchmarks/bench_separation.py`; at most 4 ms for
    cosines and levels, 15 ms with references, mixture, margin and delays up to 64 samples. Memory: two bytes and one
    int64 per slot for 65,536 sample ids, only where `ids` are given.

    Args:
        estimates: name of the tensor given to `Monitor.observe` or `Monitor.step`.
        references: name of the references. None: `"references"` where a tensor of that name is given.
        mixture: name of the mixture, (B, T), (B, 1, T) or (B, channels, T), of which the first channel is read. None:
            `"mixture"`.
        pairwise: name of the (B, S, S) pairwise losses that PIT has anyway, lower is better. None: `"pairwise"`.
        lengths: name of the (B,) valid lengths: samples (integers) or shares (floating point). None: `"lengths"`.
        source_axis: axis of the sources in estimates and references.
        every: observe when `step % every == 0`; None takes the monitor's.
        max_delay: largest delay between copies that is looked for, samples; 0 turns it off.

    Examples:
        >>> import torch
        >>> probe = Separation(max_delay=0).attach(torch.nn.Identity())
        >>> probe.arm(True, "train")
        >>> voice = torch.randn(4, 1, 800)
        >>> readings = probe.read({"estimates": torch.cat([voice, -2 * voice], 1)})
        >>> round(float(readings[Key("separation/out_cos")]), 3)
        1.0
    """

    estimates: str = "estimates"
    references: str | None = None
    mixture: str | None = None
    pairwise: str | None = None
    lengths: str | None = None
    source_axis: int = 1
    every: int | None = None
    max_delay: int = 64

    def __post_init__(self) -> None:
        if self.max_delay < 0:
            raise ValueError(f"max_delay must be a number of samples >= 0, not {self.max_delay!r}.")
        if self.source_axis == 0:
            raise ValueError("source_axis 0 is the batch; give 1 for (B, S, T) or 2 for (B, T, S).")

    def attach(self, model: nn.Module) -> Attachment:
        """Prepare to read; nothing is attached to `model`."""
        del model
        return _Attached(self)

    def covers(self, other: Probe) -> bool:
        """Whether `other` is a `Separation` that asks for nothing else: a field left at its default asks for nothing."""
        if not isinstance(other, Separation):
            return False
        default = Separation()
        names = ("estimates", "references", "mixture", "pairwise", "lengths", "source_axis")
        same = all(getattr(other, name) in (getattr(self, name), getattr(default, name)) for name in names)
        often = other.every is None or self.every == other.every or bool(self.every and other.every % self.every == 0)
        return same and often


class _Attached:
    """Device state: which assignment each sample id had last, per phase."""

    def __init__(self, spec: Separation) -> None:
        self._spec = spec
        self._on = False
        self._phase = "train"
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._told: set[str] = set()
        self.notes: list[Finding] = []

    def arm(self, on: bool, phase: str) -> None:
        self._on, self._phase = on, phase

    def detach(self) -> None:
        self._on = False
        self._seen.clear()

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        if not self._on or find(given, self._spec.estimates) is None:
            return {}
        with torch.no_grad():
            try:
                batch = SignalBatch.of(self._spec, given)
            except LayoutError as error:
                self._note(str(error), certain=error.certain)
                return {}
            with _full_precision(batch.estimates.device):
                readings = {f"separation/{name}": value for name, value in self._measure(batch, given).items()}
        return {Key(name): value for name, value in readings.items()}

    def _measure(self, batch: SignalBatch, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        outputs, references = batch.outputs, batch.references
        finite = torch.isfinite(batch.products[:, :outputs, :outputs].diagonal(dim1=1, dim2=2)).all(1)
        out["nonfinite_fraction"] = 1 - finite.float().mean()
        cos = stats.cosine(batch.products)
        levels = stats.level_db(batch.products, batch.count)
        levels_in = levels[:, outputs:] if levels.shape[1] > outputs else None
        levels_ref = levels[:, batch.reference_rows] if references is not None else None
        out["level_db"] = stats.mean_over(levels[:, :outputs].amin(1), finite)
        if levels_ref is not None:
            out["ref_level_db"] = stats.mean_over(levels_ref.amin(1), finite)
        silent = stats.quiet(levels[:, :outputs], levels_in, levels_ref)
        out["quiet_fraction"] = stats.mean_over(silent.float(), finite)
        out |= self._alike(batch, cos, levels[:, :outputs], finite)
        if references is not None and batch.mixture_row is not None and batch.same_length:
            alone, fits = stats.unrelated(batch.signals[:, batch.mixture_row], references.sum(1))
            out["unrelated_fraction"] = stats.mean_over(alone, finite)
            out["misplaced_fraction"] = fits.sum() / alone.sum().clamp(min=1)
        scores = None
        if references is not None and max(outputs, references.shape[1]) <= stats.MOST_SOURCES:
            scores, more = self._match(batch, cos, levels_ref, finite)
            out |= more
        pairwise = given.get(self._spec.pairwise or "pairwise")
        if pairwise is not None and pairwise.dim() == 3 and max(pairwise.shape[1:]) <= stats.MOST_SOURCES:
            scores = -pairwise.detach().float()
        if scores is not None and min(scores.shape[1:]) > 1:
            found = stats.assign(scores)
            usable = torch.isfinite(scores).all(-1).all(-1)
            out["margin_db"] = torch.where(usable, found.margin, torch.nan).nanmedian()
            ids = given.get("ids")
            if ids is not None and scores.shape[1] == scores.shape[2]:
                out |= self._flips(ids.to(scores.device, non_blocking=True), found.best, usable)
        return out

    def _alike(self, batch: SignalBatch, cos: Tensor, levels: Tensor, finite: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        outputs, references = batch.outputs, batch.references
        delay = min(self._spec.max_delay, batch.estimates.shape[-1] // 8)
        scale = batch.products.diagonal(dim1=1, dim2=2).clamp(min=1e-30).rsqrt()
        ref_cos = ref_delay = None
        if references is not None and references.shape[1] > 1:
            ref_cos = stats.largest_pair(cos[:, batch.reference_rows, batch.reference_rows])
            out["ref_cos"] = stats.mean_over(ref_cos, torch.isfinite(ref_cos))
        if outputs > 1:
            # What leaks into an output that is silent by right looks like a copy; `quiet` judges that one.
            heard = (levels > levels.amax(1, keepdim=True) + stats.QUIET_DB)[:, :, None]
            out_cos = stats.largest_pair(cos[:, :outputs, :outputs] * heard * heard.transpose(1, 2))
            out["out_cos"] = stats.mean_over(out_cos, finite)
            flag = stats.alike(out_cos, ref_cos)
            if delay:
                out_delay = stats.largest_pair_delayed(batch.estimates, scale[:, :outputs] * heard[..., 0], delay)
                out["out_delay_cos"] = stats.mean_over(out_delay, finite)
                if references is not None and references.shape[1] > 1:
                    ref_delay = stats.largest_pair_delayed(references, scale[:, batch.reference_rows], delay)
                    out["ref_delay_cos"] = stats.mean_over(ref_delay, torch.isfinite(ref_delay))
                flag = flag | stats.alike(out_delay, ref_delay)
            out["alike_fraction"] = stats.mean_over(flag.float(), finite)
        elif batch.estimates.shape[0] > 1:
            out["batch_cos"] = _with_next(batch.estimates[:, 0])
            if batch.mixture_row is not None:
                out["mix_batch_cos"] = _with_next(batch.signals[:, batch.mixture_row])
        if batch.mixture_row is not None:
            mix_cos = cos[:, :outputs, batch.mixture_row].abs().amin(1)
            out["mix_cos"] = stats.mean_over(mix_cos, finite)
            ref_mix = None if references is None else cos[:, batch.reference_rows, batch.mixture_row].abs().amax(1)
            out["copy_fraction"] = stats.mean_over(stats.alike(mix_cos, ref_mix).float(), finite)
        return out

    def _match(
        self, batch: SignalBatch, cos: Tensor, levels_ref: Tensor | None, finite: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert levels_ref is not None
        out: dict[str, Tensor] = {}
        outputs, sources = batch.outputs, batch.sources
        rows = batch.reference_rows
        # A silent reference has no SI-SDR: it decides nothing and counts nowhere.
        silent = levels_ref < torch.maximum(levels_ref.amax(1, keepdim=True) - 80, torch.full_like(levels_ref, -120))
        scores = stats.si_sdr_db(cos[:, :outputs, rows]).masked_fill(silent[:, None], 0.0)
        if outputs < sources:
            return scores, out
        matches = stats.assign(scores).matches
        per_source = scores.gather(1, matches[:, None])[:, 0]
        heard = ~silent & finite[:, None] & torch.isfinite(per_source)
        out["si_sdr_db"] = stats.mean_over(per_source, heard)
        worst = torch.where(heard, per_source, torch.inf).amin(1)
        out["worst_si_sdr_db"] = stats.mean_over(worst, torch.isfinite(worst))
        for source in range(sources if sources > 1 else 0):
            out[f"source{source}_si_sdr_db"] = stats.mean_over(per_source[:, source], heard[:, source])
        if batch.mixture_row is not None:
            before = stats.si_sdr_db(cos[:, batch.mixture_row, rows])
            out["si_sdri_db"] = stats.mean_over(per_source - before, heard)
        if self._phase != "train":
            order = torch.cat([matches, torch.arange(rows.start, rows.stop, device=cos.device).expand_as(matches)], 1)
            products = batch.products.gather(1, order[:, :, None].expand(-1, -1, batch.products.shape[2]))
            products = products.gather(2, order[:, None].expand(-1, order.shape[1], -1))
            sir, sar = stats.sir_sar_db(products, sources)
            for name, values in (("sir_db", sir), ("sar_db", sar)) if sources > 1 else (("sar_db", sar),):
                out[name] = stats.mean_over(values, heard)
                for source in range(sources if sources > 1 else 0):
                    out[f"source{source}_{name}"] = stats.mean_over(values[:, source], heard[:, source])
        return scores, out

    def _flips(self, ids: Tensor, best: Tensor, usable: Tensor) -> dict[str, Tensor]:
        """Compare with the last visit. Two ids that share a slot displace one another, which only loses a visit."""
        if self._phase not in self._seen or self._seen[self._phase][0].device != best.device:
            self._seen[self._phase] = (
                torch.full((SLOTS,), -1, dtype=torch.int64, device=best.device),
                torch.zeros(SLOTS, dtype=torch.int16, device=best.device),
            )
        names, last = self._seen[self._phase]
        ids = ids.detach().long().flatten()
        slot = ids.remainder(SLOTS)
        again = (names[slot] == ids) & usable
        flipped = again & (last[slot] != best)
        names[slot] = ids
        last[slot] = best.to(torch.int16)
        return {"flips": flipped.sum() / again.sum().clamp(min=1), "revisits": again.sum().float()}

    def _note(self, message: str, *, certain: bool) -> None:
        if message not in self._told:
            self._told.add(message)
            advice = (
                "Give (B, S, T), or set source_axis; a list of (B, T) tensors and (B, T) for one output are fine too."
            )
            evidence = {"certain": certain}
            self.notes.append(
                Finding("separation-layout", "warning", message, advice, phase=self._phase, evidence=evidence)
            )


def _with_next(signals: Tensor) -> Tensor:
    """Mean |cos| of each item's signal with the next item's, (B, T) -> 0-d."""
    energy = signals.square().sum(-1).clamp(min=1e-30)
    return ((signals * signals.roll(1, 0)).sum(-1) / (energy * energy.roll(1, 0)).sqrt()).abs().mean()


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would take the inner products in half precision."""
    return torch.autocast(device.type, enabled=False) if device.type in {"cpu", "cuda"} else nullcontext()
