"""Block-sparse weights on a GPU: Triton for many tokens, a CUDA kernel for few."""
