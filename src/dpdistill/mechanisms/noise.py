r"""Exactly rounded Gaussian noise on the integers, from an AES-256-CTR stream.

If S is an integer vector then S + round(N(0, s²)) = round(S + N(0, s²)): post-processing of the continuous Gaussian, so every
result about that one (PLD, Poisson amplification) carries over. Proof: docs/privacy/gaussian_sum.md.

A 64-bit word is a sign and the leading 63 bits u of an endless binary fraction p in (0, 1/2); z = -Φ⁻¹(p) is a half-normal
draw, and the result is the sign times floor(s·z + 1/2). Where the bits not yet read, or the error of Φ⁻¹ in float64, could change
the floor, more bits are read and the floor is decided with mpmath. Distance to the ideal: below 2⁻¹²⁷ per coordinate.
"""

import hashlib
import hmac

import mpmath
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

_KNOWN = ("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
_KNOWN_STREAM = "0bdf7df1591716335e9a8b15c860c502"  # NIST SP 800-38A, F.5.5: keystream of CTR-AES256, block 1
_CHUNK = 2**20


def derive(key: bytes, *labels: str | bytes) -> bytes:
    """Returns a 32-byte key for one purpose: HMAC-SHA256 of the labels, each with its length so that none runs into the next."""
    if not key:
        raise ValueError("Expected a key; this one was erased.")
    message = b"".join(
        len(raw).to_bytes(8, "big") + raw for raw in (x.encode() if isinstance(x, str) else x for x in labels)
    )
    return hmac.new(key, message, hashlib.sha256).digest()


class Stream:
    """Uniform 64-bit words of AES-256 in counter mode under a key used for nothing else."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"Expected a key of 32 bytes, got {len(key)}.")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(b"\0" * 16)).encryptor()

    def words(self, n: int) -> NDArray[np.uint64]:
        """The next n words."""
        return np.frombuffer(self._encryptor.update(bytes(8 * n)), dtype="<u8").astype(np.uint64)

    def bernoulli(self, n: int, prob: float) -> NDArray[np.bool_]:
        """n independent draws, each True with probability `prob` to within 2⁻⁵³ (a float32 uniform would quantise it to 2⁻²⁴)."""
        return (self.words(n) >> np.uint64(11)) * 2.0**-53 < prob


def self_test() -> None:
    """Raises RuntimeError unless AES-256-CTR gives the published known answer: noise fails closed."""
    encryptor = Cipher(algorithms.AES(bytes.fromhex(_KNOWN[0])), modes.CTR(bytes.fromhex(_KNOWN[1]))).encryptor()
    if encryptor.update(bytes(16)).hex() != _KNOWN_STREAM:
        raise RuntimeError("AES-256-CTR does not give its known answer on this machine; no noise can be drawn.")


self_test()


def _decide(word: int, sigma: float, stream: Stream) -> int:
    """floor(σz + 1/2) in high precision, reading 64 bits at a time until the unread ones cannot matter."""
    bits, known = word & (2**63 - 1), 63
    while True:
        bits, known = (bits << 64) | int(stream.words(1)[0]), known + 64
        with mpmath.workprec(known + 160):
            scale = mpmath.mpf(2) ** -(known + 1)
            top, bottom = (bits + 1) * scale, bits * scale
            # Φ⁻¹(p) for p <= 1/2: z = √2·erfinv(1 - 2p), at a precision that keeps 1 - 2p exact.
            low = _half_normal(top)
            high = (
                _half_normal(bottom) if bits else mpmath.inf
            )  # then no floor is the same, and the next 64 bits decide
            guard = mpmath.mpf(2) ** -(known // 2 + 40)
            first = mpmath.floor(sigma * (low - guard) + mpmath.mpf(0.5))
            if first == mpmath.floor(sigma * (high + guard) + mpmath.mpf(0.5)):
                return max(int(first), 0)


def _half_normal(p: "mpmath.mpf") -> "mpmath.mpf":
    """-Φ⁻¹(p) for 0 < p <= 1/2, by Newton's method from float64. ZeroDivisionError below 2⁻¹⁰⁷⁴, which no stream reaches."""
    z = mpmath.mpf(float(-ndtri(float(p))))
    for _ in range(60):
        step = (mpmath.erfc(z / mpmath.sqrt(2)) / 2 - p) / mpmath.npdf(z)
        z += step
        if abs(step) < mpmath.mpf(2) ** -(mpmath.mp.prec - 40):
            return z
    raise RuntimeError("The normal quantile did not converge; no noise can be drawn.")


def rounded_gaussian(n: int, sigma: float, stream: Stream) -> NDArray[np.int64]:
    """Returns n independent draws of round(N(0, sigma²)), exact to within 2⁻¹²⁷ each.

    Args:
      n: how many.
      sigma: standard deviation in grid steps, between 1e-3 and 2**45 (so that float64 resolves the grid).
      stream: gives n words in order, and more for the rare draws that float64 cannot decide.

    Raises:
      ValueError: sigma is out of range or not finite.
    """
    if not (1e-3 <= sigma <= 2.0**45):
        raise ValueError(f"Expected {sigma=} between 1e-3 and 2**45 grid steps.")
    result = np.empty(n, np.int64)
    for start in range(0, n, _CHUNK):
        words = stream.words(min(_CHUNK, n - start))
        negative = words >= np.uint64(2**63)
        leading = words & np.uint64(2**63 - 1)
        p = (leading + 0.5) * 2.0**-64  # float64
        z = np.maximum(-ndtri(p), 0.0)
        # What the unread bits can move: dz = dp/φ(z), and φ(z) >= z·p in the tail, >= 0.24 below z = 1.
        margin = 1e-12 * (1 + z) + 2.0**-64 / np.maximum(z * p, 1e-300) * (z > 1) * 2 + 2.0**-61
        lower, upper = np.floor(sigma * (z - margin) + 0.5), np.floor(sigma * (z + margin) + 0.5)
        draws = np.maximum(lower, 0).astype(np.int64)
        # Below 2²⁰ the leading bits are too few for that bound (the far tail, one draw in 2⁴³).
        for index in np.flatnonzero((lower != upper) | (leading < 2**20)):
            draws[index] = _decide(int(words[index]), sigma, stream)
        result[start : start + len(words)] = np.where(negative, -draws, draws)
    return result
