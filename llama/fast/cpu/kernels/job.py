"""The fields of a product's job.

A job is an array of int64, numbers and addresses, in the order of the names below. The threads take
chunks of its rows of weights from a cursor until none is left. A slow thread takes fewer.

TOTAL: the rows of all matrices. THREADS: the threads that share them.
"""

# BIASES: the address of the biases of all rows, float32; 0: there are none.
CURSOR, N, K, X, STEPS, OUT, TOTAL, THREADS, MATRICES, BIASES = range(10)
FIRST = 10  # from here, for each matrix: its rows, the addresses of its weights and of its scales
MAX_MATRICES = 3
LENGTH = FIRST + 3 * MAX_MATRICES
