"""``python -m layerwise`` is the same program as ``layerwise``."""

from layerwise.cli import main

main()
