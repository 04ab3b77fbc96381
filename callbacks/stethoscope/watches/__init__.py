"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._nonfinite import NonFinite as NonFinite
