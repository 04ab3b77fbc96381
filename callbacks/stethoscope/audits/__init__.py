"""Audits run once, outside the loop, and return a `Report`."""

from stethoscope.audits._causality import CausalityReport as CausalityReport
from stethoscope.audits._causality import ModeVerdict as ModeVerdict
from stethoscope.audits._causality import causality as causality
from stethoscope.audits._metrics import metrics as metrics
from stethoscope.audits._streaming import StreamingReport as StreamingReport
from stethoscope.audits._streaming import streaming as streaming
from stethoscope.audits._training import training as training
