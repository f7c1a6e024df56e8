"""The order of blocks: a permutation of range(n) that is computed, not stored.

A Feistel network (Luby & Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
SIAM J. Comput. 1988) permutes the numbers below a power of two, the first that is at least n.  A number that
comes out at n or above goes through again until it falls below: cycle walking (Black & Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002), on average two passes at the worst n.  So the block at place i of an
epoch is known without the places before it: a run goes on from three integers, and a billion blocks need no
table of 8 GB.

A linear congruential generator would be as small, but leaves steps between neighbours that a loss curve shows.
"""

import hashlib

import numpy as np
import numpy.typing as npt

ORDER_VERSION = "feistel/1"  # hashed into the keys: another version is another order, never a near one
ROUNDS = 8  # Luby and Rackoff need four when the halves are large; ours may be of 3 bits
MIN_BITS = 6  # of that power: with fewer, some orders of 4 to 6 blocks are plainly likelier than others
_Words = npt.NDArray[np.uint64]


class Permutation:
    """The permutation of range(n) that belongs to (seed, epoch); another n has wholly another one."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} numbers: it takes 1 to 2^62")
        self.n = n
        bits = max(MIN_BITS, (n - 1).bit_length())
        self._shift = np.uint64(bits // 2)  # the low half is this wide, the high half perhaps one bit wider
        self._low = np.uint64((1 << bits // 2) - 1)
        self._high = np.uint64((1 << bits - bits // 2) - 1)
        text = f"{ORDER_VERSION} {n} {seed} {epoch}"
        digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
        self._keys: _Words = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where each of these indices goes; the result has their shape."""
        if indices.size and not (0 <= indices.min() and indices.max() < self.n):
            raise IndexError(f"an index outside range({self.n})")
        numbers = self._pass(indices.reshape(-1).astype(np.uint64))
        while len(outside := np.flatnonzero(numbers >= np.uint64(self.n))):
            numbers[outside] = self._pass(numbers[outside])
        return numbers.astype(np.int64).reshape(indices.shape)

    def _pass(self, numbers: _Words) -> _Words:
        """Permute the numbers of all bits: each round changes one half by a function of the other."""
        high, low = numbers >> self._shift, numbers & self._low
        for high_key, low_key in self._keys.reshape(-1, 2):
            high ^= _mix(low ^ high_key) & self._high
            low ^= _mix(high ^ low_key) & self._low
        return (high << self._shift) | low


def _mix(words: _Words) -> _Words:
    """Let each bit of a word change all others: the finalizer of splitmix64 (Steele, Lea & Flood 2014).

    Overwrites `words`.
    """
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
