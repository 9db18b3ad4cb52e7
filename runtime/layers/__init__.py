"""Sparse layers as torch modules, over one operator."""
