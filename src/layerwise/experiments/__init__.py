"""Several runs at once: comparisons, the paper's rows, redesigned hierarchies."""
