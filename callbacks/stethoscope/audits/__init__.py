"""Audits run once, outside the loop, and return a `Report`."""

from stethoscope.audits._causality import CausalityReport as CausalityReport
from stethoscope.audits._causality import ModeVerdict as ModeVerdict
from stethoscope.audits._causality import causality as causality
