"""Watches decide: pure folds over records that return findings. No torch in here."""

from stethoscope.watches._metric_field import Field as Field
from stethoscope.watches._metric_schema import MetricSchema as MetricSchema
