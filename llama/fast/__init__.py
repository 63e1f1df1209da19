"""Fast mode: the same network for speed, on a CPU or a GPU. It is optional."""
