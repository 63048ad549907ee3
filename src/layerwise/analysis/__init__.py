"""Separability of a run's features."""
