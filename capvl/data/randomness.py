"""Random numbers of an example as a function of (seed, index): no streams, no state.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), in plain integers: a few microseconds for a
handful of numbers, where constructing a NumPy generator costs tens.
"""

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Uniforms:
    """Numbers in [0, 1), one after another, that depend on nothing but (seed, index)."""

    __slots__ = ("_state",)

    def __init__(self, seed: int, index: int):
        self._state = _mix((seed * _GAMMA + _mix(index & _MASK)) & _MASK)

    def __call__(self) -> float:
        """The next number."""
        self._state = (self._state + _GAMMA) & _MASK
        return (_mix(self._state) >> 11) * (1.0 / (1 << 53))

    def below(self, n: int) -> int:
        """The next integer in [0, n)."""
        return int(self() * n)


def replacement(seed: int, index: int, attempt: int, size: int) -> int:
    """Which record stands in for a bad one at `index`: uniform over `size`, another for each attempt."""
    return _mix((seed * _GAMMA + index * 31 + attempt + 1) & _MASK) % size


def permutation(size: int, *numbers: int) -> np.ndarray:
    """A permutation (size,) of 0 … size - 1 that depends on nothing but some integers, in any NumPy."""
    state = 0
    for number in numbers:
        state = _mix((state * _GAMMA + _mix(number & _MASK)) & _MASK)
    z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(state)  # Modulo 2**64.
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
