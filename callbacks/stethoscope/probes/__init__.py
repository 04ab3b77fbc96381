"""Probes read tensors, on the device, without waiting for it."""

from stethoscope.probes._separation import Separation as Separation
