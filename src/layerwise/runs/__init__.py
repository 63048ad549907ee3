"""Runs: what they are, their folders, their records. No torch."""
