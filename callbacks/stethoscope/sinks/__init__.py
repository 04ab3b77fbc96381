"""Sinks write records and findings somewhere."""
