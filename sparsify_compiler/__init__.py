"""Sparsify trained models."""
