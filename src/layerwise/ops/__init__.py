"""Layers and functions equal to PyTorch's, faster or smaller; they import nothing else of
layerwise.
"""
