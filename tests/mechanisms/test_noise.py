"""Noise: the exact rounded Gaussian, shown against the exact law, against high precision at the worst words, and at its source.

σ in grid steps; p tail probability; a word is a sign bit and 63 leading bits of p. Fixed keys, so each statistical test gives the same
answer every time; its false-alarm rate over keys is at most 1e-6.
"""

import hashlib
import hmac
import math
import os
import random
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import kolmogorov, ndtr, ndtri
from scipy.stats import chi2

from dpdistill.mechanisms import noise
from dpdistill.mechanisms.noise import Stream, derive, rounded_gaussian

ALPHA = 1e-6


def stream(name: str = "test") -> Stream:
    return Stream(hashlib.sha256(name.encode()).digest())


class Words:
    """A stream of crafted words."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, n: int) -> NDArray[np.uint64]:
        taken, self.left = self.left[:n], self.left[n:]
        assert len(taken) == n, "the stream ran out of crafted words"
        return np.array(taken, dtype=np.uint64)


def probability(k: NDArray[np.int64], sigma: float) -> NDArray[np.float64]:
    """P(round(N(0, σ²)) = k), from the lower tail so that nothing cancels."""
    a = np.abs(k).astype(float)
    return np.where(a == 0, 1 - 2 * ndtr(-0.5 / sigma), ndtr(-(a - 0.5) / sigma) - ndtr(-(a + 0.5) / sigma))


def test_aes_known_answers() -> None:
    """NIST SP 800-38A F.5.5 blocks 1-2 for the self-test's vector; the counter really counts."""
    noise.self_test()
    first = Stream(bytes(32)).words(4).tobytes()
    assert first[:16].hex() == "dc95c078a2408989ad48a21492842087"  # FIPS 197: AES-256 of zero under a zero key
    assert first[16:] != first[:16]
    a, b = Stream(bytes(32)), Stream(bytes(32))
    assert np.array_equal(np.concatenate([a.words(3), a.words(0), a.words(2)]), b.words(5))


def test_noise_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_KNOWN_STREAM", "00" * 16)
    with pytest.raises(RuntimeError, match="no noise"):
        noise.self_test()
    for length in (0, 16, 31, 33):
        with pytest.raises(ValueError, match="32 bytes"):
            Stream(bytes(length))
    with pytest.raises(ValueError, match="erased"):
        derive(b"", "x")


def test_where_aes_is_wrong_the_module_cannot_be_imported() -> None:
    source = noise.__spec__.loader.get_source(noise.__name__).replace(  # type: ignore[union-attr]
        noise._KNOWN_STREAM, "00" * 16
    )
    with pytest.raises(RuntimeError, match="no noise"):
        exec(compile(source, "noise.py", "exec"), {"__name__": "noise"})


def test_a_derived_key_is_the_hmac_of_counted_labels() -> None:
    """A resumed run must derive what the one before it derived, also by another version."""
    message = bytes(7) + b"\x02id" + bytes(8) + bytes(7) + b"\x03\xce\xb5\xff"
    assert derive(b"key", "id", b"", b"\xce\xb5\xff") == hmac.new(b"key", message, hashlib.sha256).digest()
    assert derive(b"key", "ε") == derive(b"key", "ε".encode())


def test_labels_do_not_run_together() -> None:
    key = bytes(32)
    names = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("abc", ""),
        ("", "abc"),
        ("a", "b", "c"),
        ("noise", "x"),
        ("sample", "x"),
    ]
    assert len({derive(key, *labels) for labels in names}) == len(names)
    assert derive(key, "a") != derive(b"\1" * 32, "a")


@pytest.mark.parametrize("sigma", [0.7, 3.0, 64.0])
def test_chi_square_against_the_exact_law(sigma: float) -> None:
    n = 1_000_000
    draws = rounded_gaussian(n, sigma, stream(f"chi {sigma}"))
    reach = math.ceil(6 * sigma) + 1
    k = np.arange(-reach, reach + 1)
    expected = n * probability(k, sigma)
    seen = np.bincount(np.clip(draws, -reach, reach) + reach, minlength=len(k))
    big = expected >= 20
    expected, seen = np.append(expected[big], n - expected[big].sum()), np.append(seen[big], seen[~big].sum())
    statistic = float(((seen - expected) ** 2 / np.maximum(expected, 5)).sum())
    assert ALPHA < chi2.sf(statistic, len(expected) - 1) < 1 - ALPHA


@pytest.mark.parametrize("sigma", [64.0, 2.0**20, 2.0**30])
def test_kolmogorov_smirnov(sigma: float) -> None:
    n = 300_000
    draws = np.sort(rounded_gaussian(n, sigma, stream(f"ks {sigma}")))
    values, first = np.unique(draws, return_index=True)
    after = np.append(first[1:], n)
    law = ndtr((values + 0.5) / sigma), ndtr((values - 0.5) / sigma)
    distance = max(np.abs(after / n - law[0]).max(), np.abs(first / n - law[1]).max())
    assert kolmogorov(distance * math.sqrt(n)) > ALPHA
    for wrong in (0.98, 1.02):  # and the test has teeth
        assert kolmogorov(np.abs(after / n - ndtr((values + 0.5) / (sigma * wrong))).max() * math.sqrt(n)) < ALPHA


@pytest.mark.parametrize("sigma", [0.7, 3.0, 64.0, 2.0**20])
def test_variance_within_a_hundredth(sigma: float) -> None:
    """A standard deviation 0.55 % too small is seen with power 99.9 %."""
    n = 1_000_000
    draws = rounded_gaussian(n, sigma, stream(f"variance {sigma}")).astype(float)
    if sigma < 100:
        k = np.arange(-40 * 64, 40 * 64 + 1)
        variance = float((probability(k, sigma) * k.astype(float) ** 2).sum())
    else:
        variance = sigma**2 + 1 / 12
    kurtosis = 3.2 if sigma < 1 else 3.0
    spread = math.sqrt((kurtosis - 1) / n)
    assert abs((draws**2).mean() / variance - 1) < 4.9 * spread < 0.0075
    assert abs(draws.mean()) < 4.9 * math.sqrt(variance / n)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4.9 / math.sqrt(n)


def test_the_tail_goes_on_past_a_float32_generator() -> None:
    """torch.randn ends at 5.77σ; ours has the exact law as far as 64 bits and then goes on."""
    draws = rounded_gaussian(4, 1000.0, Words(0, 2**63, 2**20, 2**63 + 2**40, *[2**63] * 8))  # type: ignore[arg-type]
    assert draws[0] > 9100
    assert draws[1] < -9100
    assert 7300 < draws[2] < 7500
    assert -5400 < draws[3] < -5200
    deeper = rounded_gaussian(1, 1000.0, Words(0, 0, 0, 5, *[1] * 4))  # type: ignore[arg-type]
    assert 15_000 < deeper[0] < 25_000
    # In a long run: more than 4.9 standard deviations occur as often as they should.
    n = 4_000_000
    seen = int((np.abs(rounded_gaussian(n, 64.0, stream("tail"))) >= 4.5 * 64).sum())
    expected = 2 * n * ndtr(-(4.5 * 64 - 0.5) / 64)
    assert abs(seen - expected) < 5 * math.sqrt(expected)


def boundary(k: int, sigma: float, bits: int) -> int:
    """floor(2^bits · P(N > (k - 1/2)/σ)): the first bits of the p at which the rounded value steps from k - 1 up to k."""
    with mpmath.workprec(bits + 200):
        z = (mpmath.mpf(k) - mpmath.mpf(0.5)) / mpmath.mpf(sigma)
        return int(mpmath.floor(mpmath.erfc(z / mpmath.sqrt(2)) / 2 * mpmath.mpf(2) ** bits))


@pytest.mark.parametrize("sigma", [0.06, 0.7, 3.0, 64.3, 2.0**20, 2.0**33 / 3, 2.0**45])
def test_words_at_the_rounding_boundaries(sigma: float) -> None:
    """p cut off at, or one unit to either side of, the 256th bit of a step: right on both sides, however many words it takes."""
    reach = [
        k
        for k in {1, 2, 3, int(sigma), int(2.5 * sigma), int(6 * sigma), int(8.9 * sigma)}
        if 0.5 < k <= 0.5 + 9 * sigma
    ]
    for k in reach:
        bits = boundary(k, sigma, 64 + 192)
        for offset, expected in ((0, k), (1, k - 1), (-1, k), (2**100, k - 1), (-(2**100), k)):
            p = bits + offset
            if not 0 <= p < 2**255:
                continue
            lead, rest = p >> 192, [(p >> shift) & (2**64 - 1) for shift in (128, 64, 0)]
            for sign in (0, 1):
                words = Words(lead | sign << 63, *rest, *[0] * 12)
                (drawn,) = rounded_gaussian(1, sigma, words).tolist()  # type: ignore[arg-type]
                assert drawn == (-expected if sign else expected), (sigma, k, offset)


@pytest.mark.parametrize("sigma", [3.0, 2.0**33 / 3, 2.0**45])
@pytest.mark.parametrize("z", [0.0, 0.4, 0.99, 1.01, 2.5, 4.0, 5.5, 6.6, 7.3, 7.6])
def test_a_word_that_holds_a_step_is_read_on(z: float, sigma: float) -> None:
    """A step lies within the word's interval of p, so both ends of the interval must be told apart, also in the far tail."""
    for k in range(int(z * sigma) + 1, int(z * sigma) + 4):
        lead = boundary(k, sigma, 64)
        drawn = []
        for rest in (0, 2**64 - 1):
            words = Words(lead, *[rest] * 12)
            drawn += rounded_gaussian(1, sigma, words).tolist()  # type: ignore[arg-type]
            assert len(words.left) == 11
            p = lead << 192 | rest << 128 | rest << 64 | rest
            assert (
                boundary(drawn[-1] + 1, sigma, 256) <= p <= (boundary(drawn[-1], sigma, 256) if drawn[-1] else 2**255)
            )
        assert drawn[0] >= k > drawn[1]


@pytest.mark.parametrize("sigma", [0.7, 64.0, 2.0**20, 2.0**40])
def test_neighbouring_words_against_high_precision(sigma: float) -> None:
    """The float64 path alone: words around a step, where only the margin tells which are undecidable."""
    rng = random.Random(7)
    for _ in range(40):
        k = 1 + int(abs(rng.gauss(0, 1)) * sigma)
        lead = boundary(k, sigma, 64) + rng.choice([-1000, -3, -2, -1, 0, 1, 2, 3, 1000, 10**6])
        if not 0 <= lead < 2**63:
            continue
        tail = [rng.getrandbits(64) for _ in range(3)]
        p = lead << 192 | tail[0] << 128 | tail[1] << 64 | tail[2]
        (drawn,) = rounded_gaussian(1, sigma, Words(lead, *tail, 0, 0)).tolist()  # type: ignore[arg-type]
        # drawn = j exactly where p lies between the steps of j + 1 (excluded) and j.
        assert drawn == 0 or p <= boundary(drawn, sigma, 256)
        assert p >= boundary(drawn + 1, sigma, 256)


def test_a_quantile_that_does_not_converge_is_no_noise() -> None:
    with mpmath.workprec(300):
        for p in (mpmath.mpf(2) ** -1000, mpmath.mpf("1e-9"), mpmath.mpf("0.3"), mpmath.mpf(0.5)):
            z = noise._half_normal(p)
            assert abs(mpmath.erfc(z / mpmath.sqrt(2)) / 2 - p) < p * mpmath.mpf(2) ** -240
        with pytest.raises(ZeroDivisionError):  # not to be reached: seventeen words of zeros
            noise._half_normal(mpmath.mpf(2) ** -1100)


def test_a_quantile_that_stays_away_is_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpmath, "erfc", lambda _: mpmath.mpf(1))
    monkeypatch.setattr(mpmath, "npdf", lambda _: mpmath.mpf(1))
    with pytest.raises(RuntimeError, match="no noise"):
        noise._half_normal(mpmath.mpf("0.3"))


# How far a draw reads is promised too: the words that follow belong to later draws, and a resumed run has to draw the same noise.

IN_THE_MIDDLE = [int(p * 2**64) for p in (0.5 - 4e-11, 0.496, 0.38, 0.2, 0.07, 0.001)]
IN_THE_TAIL = [2**20 + 1, 2**21 + 1, 2**24 + 3, 2**31 + 1, 2**38 + 1]


@pytest.mark.parametrize("lead", IN_THE_MIDDLE + IN_THE_TAIL)
def test_a_draw_reads_on_exactly_within_the_margin(lead: int) -> None:
    """m as in docs/privacy/gaussian_sum.md: a step nearer than that is left to the next word, one further away is not."""
    p = (lead + 0.5) * 2.0**-64
    z = -float(ndtri(p))
    margin = 1e-12 * (1 + z) + (2.0**-63 / (z * p) if z > 1 else 0.0)
    for share in (-1.02, -0.98, 0.98, 1.02):
        sigma = 0.5 / (z + share * margin)  # so the step from 0 to 1 is there
        words = Words(lead, *[2**63] * 3)
        assert abs(int(rounded_gaussian(1, sigma, words)[0])) <= 1  # type: ignore[arg-type]
        assert len(words.left) == (2 if abs(share) < 1 else 3), share


@pytest.mark.parametrize(
    ("lead", "reads"), [(0, 1), (40, 1), (2**19, 1), (2**20 - 1, 1), (2**20, 0), (2**20 + 1, 0), (2**21, 0), (2**32, 0)]
)
def test_in_the_far_tail_every_draw_reads_on(lead: int, reads: int) -> None:
    words = Words(lead, 2**63, 2**63)
    assert not rounded_gaussian(1, 0.01, words).any()  # type: ignore[arg-type]
    assert len(words.left) == 2 - reads


@pytest.mark.parametrize(("share", "reads"), [(-1.02, 1), (-0.98, 2), (0.98, 2), (1.02, 1)])
@pytest.mark.parametrize("sigma", [0.25, 1.0, 8.0])
def test_high_precision_reads_on_within_its_guard(share: float, reads: int, sigma: float) -> None:
    """At 127 known bits 2**-103 to either side of a step, far more than a unit of the 127th bit moves."""
    with mpmath.workprec(400):
        p = mpmath.erfc((mpmath.mpf(0.5 / sigma) + share * mpmath.mpf(2) ** -103) / mpmath.sqrt(2)) / 2
        bits = int(mpmath.floor(p * mpmath.mpf(2) ** 128))
    words = Words(bits & (2**64 - 1), 2**63, 2**63)
    assert noise._decide(bits >> 64, sigma, words) == (share > 0)  # type: ignore[arg-type]
    assert len(words.left) == 3 - reads


@pytest.mark.parametrize(("offset", "reads"), [(-0.5, 1), (0.5, 2), (1.5, 1)])
def test_high_precision_reads_on_where_the_word_holds_a_step(offset: float, reads: int) -> None:
    """In the far tail, where a word's two ends lie far apart: the step may be at any place between them and at no other."""
    word = 2**20 + 1
    step = float(noise._half_normal((word + mpmath.mpf(offset)) * mpmath.mpf(2) ** -128))
    words = Words(word, 2**62, 2**62)
    assert noise._decide(0, 0.5 / step, words) == (offset > 0.25)  # type: ignore[arg-type]
    assert len(words.left) == 3 - reads


def test_decide_against_float64_in_the_clear() -> None:
    rng = random.Random(3)
    for _ in range(50):
        word, sigma = rng.getrandbits(63), 2.0 ** rng.uniform(-3, 30)
        value = sigma * -float(ndtri((word + 0.5) * 2.0**-64)) + 0.5
        if abs(value - round(value)) > 1e-9 * (1 + value):
            assert noise._decide(word, sigma, Words(*[rng.getrandbits(64) for _ in range(4)])) == math.floor(value)  # type: ignore[arg-type]


def test_the_float64_quantile_is_far_better_than_the_margin() -> None:
    """Error of ndtri against 120-bit arithmetic, over the whole range of p; the sampler allows 1e-12 (1 + z)."""
    rng = np.random.default_rng(5)
    p = np.concatenate([2.0 ** -rng.uniform(1, 65, 1500), 0.5 - 2.0 ** -rng.uniform(2, 53, 500), [0.5, 0.5 * 2.0**-64]])
    worst = 0.0
    with mpmath.workprec(120):
        for one, z in zip(p.tolist(), (-ndtri(p)).tolist(), strict=True):
            error = (mpmath.erfc(mpmath.mpf(z) / mpmath.sqrt(2)) / 2 - mpmath.mpf(one)) / mpmath.npdf(z)
            worst = max(worst, abs(float(error)) / (1 + z))
    assert worst < 1e-14


def test_no_word_comes_twice() -> None:
    """Over ten releases of a million words each: a repeat has probability 3e-6 over all keys, and these keys are fixed."""
    words = np.concatenate([Stream(derive(bytes(32), "noise", str(i))).words(1_000_000) for i in range(10)])
    words.sort()
    assert not (words[1:] == words[:-1]).any()


@pytest.mark.parametrize("n", [0, 1, 5, 2**20 + 3])
def test_any_length_and_every_coordinate(n: int) -> None:
    draws = rounded_gaussian(n, 2.0**20, stream("length"))
    assert draws.shape == (n,)
    assert draws.dtype == np.int64
    assert (draws != 0).mean() > 0.999 if n else True
    if n > 2**20:  # the last chunk is noise as well, and not the first one again
        assert not np.array_equal(draws[:3], draws[2**20 :])


def test_noise_is_drawn_in_pieces_that_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise, whatever the pieces."""
    assert 2**16 <= noise._CHUNK <= 2**24  # a temporary is 128 MiB at most
    whole = rounded_gaussian(10, 64.0, stream("pieces"))
    monkeypatch.setattr(noise, "_CHUNK", 4)
    asked: list[int] = []
    source = stream("pieces")
    watched = SimpleNamespace(words=lambda n: (asked.append(n), source.words(n))[1])
    assert np.array_equal(rounded_gaussian(10, 64.0, watched), whole)  # type: ignore[arg-type]
    assert asked == [4, 4, 2]


def test_sigma_at_the_limits() -> None:
    assert not rounded_gaussian(3, 1e-3, stream()).any()
    assert 2**44 < np.abs(rounded_gaussian(30, 2.0**45, stream())).mean() < 2**46


@pytest.mark.parametrize("sigma", [math.nan, math.inf, 0, -1, 1e-9, 0.999e-3, 2.0**45 * 1.001, 2.0**46])
def test_bad_sigma_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma"):
        rounded_gaussian(3, sigma, stream())


def test_global_generators_neither_seed_nor_feel_it() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = rounded_gaussian(100, 64.0, stream("seeds"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(first, rounded_gaussian(100, 64.0, stream("seeds")))


def test_fresh_keys_differ() -> None:
    assert not np.array_equal(
        rounded_gaussian(9, 64.0, Stream(os.urandom(32))), rounded_gaussian(9, 64.0, Stream(os.urandom(32)))
    )
