"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._sparsity import Sparsity as Sparsity
