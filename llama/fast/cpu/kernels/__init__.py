"""Compiled kernels for the CPU. They need numba, which the extra [fast] installs."""
