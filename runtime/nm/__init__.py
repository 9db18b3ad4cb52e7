"""Weights that keep n of every m columns: 2:4 on sparse tensor cores, the wider groups on dense ones and by GEMV."""
