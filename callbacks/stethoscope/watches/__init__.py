"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._assignment import Assignment as Assignment
from stethoscope.watches._jumps import Jumps as Jumps
from stethoscope.watches._nonfinite import NonFinite as NonFinite
from stethoscope.watches._output_collapse import OutputCollapse as OutputCollapse
from stethoscope.watches._plateau import Plateau as Plateau
