"""Audits run once, outside the loop, and return a `Report`."""

from stethoscope.audits._training import training as training
