"""Kernels that run on a CPU: compressed rows and blocks."""
