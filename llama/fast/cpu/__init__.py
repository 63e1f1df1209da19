"""Fast mode on a CPU: all layers as one list of compiled tasks."""
