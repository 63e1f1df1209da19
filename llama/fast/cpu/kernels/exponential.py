"""exp in float32, by arithmetic only, so that a loop of it compiles to vector instructions.

numba's own np.exp is a call of the C library's for every single number.
"""

import math

import numpy as np
from numba import njit

MIN_X, MAX_X = -87, 88  # beyond them the result is no normal number
PER_OCTAVE = np.float32(1 / math.log(2))
# log(2) in two pieces, of which the first has so few bits that its multiples are exact.
OCTAVE = np.float32(0.693359375)
OCTAVE_REST = np.float32(math.log(2) - 0.693359375)
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(i)) for i in range(2, 8))


@njit(error_model="numpy", fastmath={"contract"})
def exp(x):  # type: ignore[no-untyped-def]
    """exp of a float32 to a few units in its last place; NaN stays NaN.

    x = octaves * log(2) + rest: 2**octaves is a matter of the exponent's bits, and |rest| <= 0.35
    needs few terms of the series.
    """
    x = min(max(x, np.float32(MIN_X)), np.float32(MAX_X))
    octaves = np.rint(x * PER_OCTAVE)
    rest = x - octaves * OCTAVE - octaves * OCTAVE_REST
    series = C3 + rest * (C4 + rest * (C5 + rest * (C6 + rest * C7)))
    series = np.float32(1) + rest * (np.float32(1) + rest * (C2 + rest * series))
    bits = np.int32((np.int32(octaves) + np.int32(127)) << np.int32(23))
    return series * bits.view(np.float32)
