"""Audits run once, outside the loop, and return a `Report`."""

from stethoscope.audits._metrics import metrics as metrics
from stethoscope.audits._nonfinite import nonfinite as nonfinite
from stethoscope.audits._precision import precision as precision
from stethoscope.audits._stress import stress as stress
