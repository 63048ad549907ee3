"""The paper's rows, numbers, claims and verdicts. No torch."""
