"""Unstructured weights on a GPU: a GEMV for few tokens, expansion to dense for many."""
