"""Fast mode: faster code for the same network, on a CPU or a GPU. It is optional."""
