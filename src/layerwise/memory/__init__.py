"""The memory of training, counted or predicted."""
