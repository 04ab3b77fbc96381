"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._inputdrift import InputDrift as InputDrift
from stethoscope.watches._nonfinite import NonFinite as NonFinite
from stethoscope.watches._sparsity import Sparsity as Sparsity
