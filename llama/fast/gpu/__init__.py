"""Fast mode on a GPU: decode steps of static shapes in CUDA graphs, and narrow weights."""
