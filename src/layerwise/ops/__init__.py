"""Layers and functions equal to PyTorch's, but faster or smaller.

They import nothing else of layerwise but utilities and errors.
"""
