"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._jumps import Jumps as Jumps
from stethoscope.watches._plateau import Plateau as Plateau
