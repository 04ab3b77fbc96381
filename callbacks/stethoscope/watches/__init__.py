"""Watches decide: pure folds over records that return findings. No torch in here."""
