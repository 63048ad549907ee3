"""The cost of a step: predicted, measured, shown."""
