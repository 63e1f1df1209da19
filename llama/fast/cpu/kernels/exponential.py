"""exp in float32, by arithmetic only, so that a loop of it compiles to vector instructions.

numba compiles np.exp to a call of the C library for every number.
"""

import math

import numpy as np
from numba import njit

MIN_X, MAX_X = -87, 88  # beyond these the result is not a normal float32
INVERSE_LN2 = np.float32(1 / math.log(2))
# log(2) in two parts. The first has so few bits that its multiples are exact.
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(math.log(2) - 0.693359375)
C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(i)) for i in range(2, 8))


@njit(error_model="numpy", fastmath={"contract"})
def exp(x):  # type: ignore[no-untyped-def]
    """exp of a float32 to a few units in its last place; NaN stays NaN.

    x = power * log(2) + rest. 2**power is written into the exponent's bits. |rest| <= 0.35, so that
    a few terms of the series suffice.
    """
    x = min(max(x, np.float32(MIN_X)), np.float32(MAX_X))
    power = np.rint(x * INVERSE_LN2)
    rest = x - power * LN2_HIGH - power * LN2_LOW
    series = C3 + rest * (C4 + rest * (C5 + rest * (C6 + rest * C7)))
    series = np.float32(1) + rest * (np.float32(1) + rest * (C2 + rest * series))
    bits = np.int32((np.int32(power) + np.int32(127)) << np.int32(23))
    return series * bits.view(np.float32)
