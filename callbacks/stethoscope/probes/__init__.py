"""Probes read tensors, on the device, without waiting for it."""
