"""Audits run once, outside the loop, and return a `Report`."""
