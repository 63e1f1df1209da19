"""Training: data, objective, optimizer, loop, checkpoints and logs."""
