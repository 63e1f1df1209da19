"""Perplexity, and the tasks of the lm-evaluation-harness."""
