"""Triton kernels for decode steps: products of few tokens, and attention over the KV cache."""
