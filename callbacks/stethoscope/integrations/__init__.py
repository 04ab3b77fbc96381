"""Integrations translate a framework's hooks into calls of `Monitor`; they decide nothing."""
