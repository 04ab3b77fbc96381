"""Audits run once, outside the loop, and return a `Report`."""

from stethoscope.audits._checkpoint import CheckpointReport as CheckpointReport
from stethoscope.audits._checkpoint import checkpoint as checkpoint
from stethoscope.audits._describe import describe as describe
