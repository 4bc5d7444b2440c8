"""Public images out of nothing: the auxiliary set of a user who has none.

A mix of what is cheap to draw and varied enough to shape random features: pen strokes, silhouettes (half of them with
left-right symmetry, like garments or faces), soft blobs, gradients, oriented textures, and dead leaves (overlapping
discs and boxes, whose statistics resemble natural images; Lee, Mumford & Huang 2001; Baradad et al. 2021).

Shapes: N images, C channels, H height, W width, P points, S shapes of one image. Coordinates run from -1 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHUNK = 256  # images drawn together: enough to amortise Python, small enough for the cache


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Pixel centres in [-1, 1], and the source of randomness. `soft` is the width of an antialiased edge."""

    x_HW: np.ndarray
    y_HW: np.ndarray
    soft: float
    rng: np.random.Generator

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Returns float32 numbers in [low, high)."""
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def fill(self, distance: np.ndarray) -> np.ndarray:
        """Returns coverage in [0, 1] from a signed distance: inside is negative."""
        return np.clip(0.5 - distance / self.soft, 0, 1)


def procedural_images(n: int, channels: int, height: int, width: int, seed: int) -> np.ndarray:
    """Returns public random images, the same for the same arguments.

    Args:
      n: how many.
      channels: 1 or 3.
      height, width: 8 to 64 pixels each.
      seed: of a numpy Generator of their own. No privacy noise comes from it.

    Returns:
      uint8 [N, C, H, W].

    Raises:
      ValueError: an argument is out of range.

    >>> procedural_images(4, 3, 8, 12, seed=0).shape
    (4, 3, 8, 12)
    """
    if n < 0 or channels not in (1, 3) or not (8 <= height <= 64 and 8 <= width <= 64):
        raise ValueError(f"Expected {n=} >= 0, {channels=} 1 or 3, {height=} and {width=} in 8..64.")
    rng = np.random.default_rng(seed)
    y_H = (np.arange(height, dtype=np.float32) + 0.5) / height * 2 - 1
    x_W = (np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1
    x_HW, y_HW = np.meshgrid(x_W, y_H)
    canvas = Canvas(x_HW=x_HW, y_HW=y_HW, soft=2 / min(height, width), rng=rng)
    out = np.empty((n, channels, height, width), np.uint8)
    for start in range(0, n, CHUNK):
        images = draw(min(CHUNK, n - start), channels, canvas)
        out[start : start + CHUNK] = np.rint(images * 255)
    return out


def draw(n: int, channels: int, canvas: Canvas) -> np.ndarray:
    """Returns float32 [N, C, H, W] in [0, 1]: a shape over a background, or a texture alone, in random order."""
    kind_N = canvas.rng.choice(len(KINDS), n, p=[share for share, _ in KINDS])
    out = np.empty((n, channels, *canvas.x_HW.shape), np.float32)
    for k, (_, paint) in enumerate(KINDS):
        here_N = kind_N == k
        if here_N.any():
            out[here_N] = paint(int(here_N.sum()), channels, canvas)
    flip_N = canvas.uniform(0, 1, n) < 0.12  # dark on light is rarer than light on dark, but exists
    out[flip_N] = 1 - out[flip_N]
    return np.clip(out, 0, 1)


# --- shapes: coverage in [0, 1], [N, H, W] ---


def strokes(n: int, canvas: Canvas) -> np.ndarray:
    """Returns 1 to 4 curved pen strokes an image: cubic Bézier curves, densely sampled, of one width."""
    n_points, n_strokes = 30, 4
    t_P = np.linspace(0, 1, n_points, dtype=np.float32)
    basis_P4 = np.stack([(1 - t_P) ** 3, 3 * t_P * (1 - t_P) ** 2, 3 * t_P**2 * (1 - t_P), t_P**3], axis=1)
    control = canvas.uniform(-1, 1, n, n_strokes, 4, 2) * canvas.uniform(0.5, 0.95, n, 1, 1, 1)
    joined_NS = canvas.uniform(0, 1, n, n_strokes - 1) < 0.6
    control[:, 1:, 0] = np.where(joined_NS[..., None], control[:, :-1, 3], control[:, 1:, 0])
    n_used_N = canvas.rng.integers(1, n_strokes + 1, n)
    # Squared distance |p - q|^2 - |q|^2 = (-2p, |p|^2) . (q, 1) for points p and pixels q: one matrix product.
    pixels_3D = np.stack([canvas.x_HW.ravel(), canvas.y_HW.ravel(), np.ones(canvas.x_HW.size, np.float32)])
    nearest_ND = np.full((n, canvas.x_HW.size), np.inf, np.float32)
    for s in range(n_strokes):
        here = np.flatnonzero(n_used_N > s)
        points = basis_P4 @ control[here, s]
        terms = np.concatenate([-2 * points, (points**2).sum(-1, keepdims=True)], axis=-1)
        to_points = (terms.reshape(-1, 3) @ pixels_3D).reshape(len(here), n_points, canvas.x_HW.size)
        nearest_ND[here] = np.minimum(nearest_ND[here], to_points.min(axis=1))
    distance = np.sqrt(np.maximum(nearest_ND + (pixels_3D[:2] ** 2).sum(axis=0), 0)).reshape(n, *canvas.x_HW.shape)
    return canvas.fill(distance - canvas.uniform(0.07, 0.18, n, 1, 1))


def silhouettes(n: int, canvas: Canvas) -> np.ndarray:
    """Returns unions of 1 to 4 ellipses, boxes and polygons, sometimes with a hole; half of them symmetric."""
    symmetric_N = canvas.uniform(0, 1, n, 1, 1) < 0.5
    x = np.where(symmetric_N, np.abs(canvas.x_HW), canvas.x_HW)
    n_used_N = canvas.rng.integers(1, 5, n)
    distance = np.full(x.shape, 9, np.float32)
    for s in range(4):
        here = np.flatnonzero(n_used_N > s)
        reach = 0.3 if s == 0 else 0.6  # the first shape is the body, in the middle
        distance[here] = np.minimum(distance[here], some_shape(len(here), x[here], reach, canvas))
    holed = np.flatnonzero(canvas.uniform(0, 1, n) < 0.25)
    distance[holed] = np.maximum(distance[holed], -0.1 - some_shape(len(holed), x[holed], 0.5, canvas))
    return canvas.fill(distance)


def some_shape(n: int, x: np.ndarray, reach: float, canvas: Canvas) -> np.ndarray:
    """Returns roughly signed distances [N, H, W] to one ellipse, box or star-like polygon an image, rotated."""
    u, v = rotated(
        n, x - canvas.uniform(-reach, reach, n, 1, 1), canvas.y_HW - canvas.uniform(-reach, reach, n, 1, 1), canvas
    )
    a, b = canvas.uniform(0.15, 0.7, n, 1, 1), canvas.uniform(0.15, 0.7, n, 1, 1)
    scale = np.minimum(a, b)
    ellipse = (np.hypot(u / a, v / b) - 1) * scale
    box = np.maximum(np.abs(u) - a, np.abs(v) - b)
    corners = canvas.rng.integers(3, 8, (n, 1, 1))
    # Radius of a regular polygon as a function of the angle, bent inwards to a star by `dent`.
    sector = 2 * np.pi / corners
    angle = np.mod(np.arctan2(v, u), sector) - sector / 2
    dent = canvas.uniform(0, 0.5, n, 1, 1)
    edge = np.cos(sector / 2) / np.cos(angle) * (1 - dent * (1 - np.abs(angle) / (sector / 2)))
    polygon = np.hypot(u, v) - 1.3 * scale * edge
    which = canvas.rng.integers(0, 3, (n, 1, 1))
    return np.where(which == 0, ellipse, np.where(which == 1, box, polygon)).astype(np.float32)


def rotated(n: int, x: np.ndarray, y: np.ndarray, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Returns coordinates turned by one random angle an image; a third of them stay upright."""
    turn = canvas.uniform(0, 2 * np.pi, n, 1, 1) * (canvas.uniform(0, 1, n, 1, 1) > 1 / 3)
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


def blobs(n: int, canvas: Canvas) -> np.ndarray:
    """Returns sums of 1 to 5 soft, stretched Gaussian spots."""
    total = np.zeros((n, *canvas.x_HW.shape), np.float32)
    n_used_N = canvas.rng.integers(1, 6, (n, 1, 1))
    for s in range(5):
        dx, dy = canvas.x_HW - canvas.uniform(-0.7, 0.7, n, 1, 1), canvas.y_HW - canvas.uniform(-0.7, 0.7, n, 1, 1)
        u, v = rotated(n, dx, dy, canvas)
        spot = np.exp(-((u / canvas.uniform(0.1, 0.5, n, 1, 1)) ** 2) - (v / canvas.uniform(0.1, 0.5, n, 1, 1)) ** 2)
        total += spot * canvas.uniform(0.4, 1, n, 1, 1) * (s < n_used_N)
    return np.minimum(total, 1)


# --- textures: values in [0, 1], [N, H, W] ---


def gradients(n: int, canvas: Canvas) -> np.ndarray:
    """Returns linear or radial ramps of random direction and steepness."""
    u, _ = rotated(n, canvas.x_HW + np.zeros((n, 1, 1), np.float32), canvas.y_HW, canvas)
    r = np.hypot(canvas.x_HW - canvas.uniform(-1, 1, n, 1, 1), canvas.y_HW - canvas.uniform(-1, 1, n, 1, 1)) - 0.7
    ramp = np.where(canvas.uniform(0, 1, n, 1, 1) < 0.5, u, r) + canvas.uniform(-0.5, 0.5, n, 1, 1)
    return (1 / (1 + np.exp(-canvas.uniform(1, 8, n, 1, 1) * ramp))).astype(np.float32)


def textures(n: int, canvas: Canvas) -> np.ndarray:
    """Returns noise with a power-law spectrum, stretched along a random direction, or a plain wave in it."""
    h, w = canvas.x_HW.shape
    fy, fx = np.meshgrid(np.fft.fftfreq(h) * h / 2, np.fft.rfftfreq(w) * w / 2, indexing="ij")
    u, v = rotated(n, fx.astype(np.float32), fy.astype(np.float32), canvas)
    stretch = canvas.uniform(1, 6, n, 1, 1)
    power = (0.3 + u**2 + (stretch * v) ** 2) ** (-canvas.uniform(0.4, 1.3, n, 1, 1))
    white = canvas.rng.standard_normal((n, h, w), np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white) * power, s=(h, w)).astype(np.float32)
    noise -= noise.mean((1, 2), keepdims=True)
    noise /= noise.std((1, 2), keepdims=True) + 1e-6
    along, across = rotated(n, canvas.x_HW + np.zeros((n, 1, 1), np.float32), canvas.y_HW, canvas)
    wave = np.sin(canvas.uniform(3, 14, n, 1, 1) * along + 0.6 * noise * np.cos(across)) * 1.5
    mixed = np.where(canvas.uniform(0, 1, n, 1, 1) < 0.35, wave, noise)
    return np.clip(0.5 + mixed * canvas.uniform(0.12, 0.3, n, 1, 1), 0, 1)


def leaves(n: int, channels: int, canvas: Canvas) -> np.ndarray:
    """Returns dead leaves [N, C, H, W]: 24 discs and boxes an image, few large, many small, each over the last."""
    image = colours(n, channels, canvas, 0, 1) + np.zeros((1, 1, *canvas.x_HW.shape), np.float32)
    for s in range(24):
        size = 0.9 / (1 + s) ** 0.6 * canvas.uniform(0.5, 1.3, n, 1, 1)
        dx, dy = canvas.x_HW - canvas.uniform(-1.1, 1.1, n, 1, 1), canvas.y_HW - canvas.uniform(-1.1, 1.1, n, 1, 1)
        disc = np.sqrt(dx**2 + dy**2) - size
        u, v = rotated(n, dx, dy, canvas)
        box = np.maximum(np.abs(u) - size, np.abs(v) - size * canvas.uniform(0.2, 1, n, 1, 1))
        cover = canvas.fill(np.where(canvas.uniform(0, 1, n, 1, 1) < 0.5, disc, box))[:, None]
        image += cover * (colours(n, channels, canvas, 0, 1) - image)
    return image


# --- whole images: [N, C, H, W] ---


def colours(n: int, channels: int, canvas: Canvas, low: float, high: float) -> np.ndarray:
    """Returns one colour an image [N, C, 1, 1]: a brightness, and a tint around it."""
    grey = canvas.uniform(low, high, n, 1, 1, 1)
    tint = canvas.uniform(-0.35, 0.35, n, channels, 1, 1) if channels == 3 else 0
    return np.clip(grey + tint, 0, 1).astype(np.float32)


def some_texture(n: int, channels: int, canvas: Canvas) -> np.ndarray:
    """Returns a ramp or a texture between two colours."""
    mix = np.where(canvas.uniform(0, 1, n, 1, 1) < 0.5, gradients(n, canvas), textures(n, canvas))[:, None]
    dark, light = colours(n, channels, canvas, 0, 0.5), colours(n, channels, canvas, 0.4, 1)
    return dark + mix * (light - dark)


def shaped(cover: Callable[[int, Canvas], np.ndarray]) -> Callable[[int, int, Canvas], np.ndarray]:
    """Returns a painter of light shapes, plain or textured, on a dark ground that is usually plain."""

    def paint(n: int, channels: int, canvas: Canvas) -> np.ndarray:
        """Returns [N, C, H, W]."""
        chance = canvas.uniform(0, 1, n, 1, 1, 1)
        black = np.zeros((n, channels, 1, 1), np.float32)
        plain_ground = np.where(chance < 0.55, black, colours(n, channels, canvas, 0, 0.5))
        ground = np.where(chance < 0.8, plain_ground, 0.7 * some_texture(n, channels, canvas))
        plain = colours(n, channels, canvas, 0.55, 1)
        front = np.where(canvas.uniform(0, 1, n, 1, 1, 1) < 0.5, plain, 0.3 + 0.7 * some_texture(n, channels, canvas))
        return ground + cover(n, canvas)[:, None] * (front - ground)

    return paint


# Shares: half of the images are things on a ground, as in most labelled data sets; the rest have no figure.
KINDS: tuple[tuple[float, Callable[[int, int, Canvas], np.ndarray]], ...] = (
    (0.28, shaped(strokes)),
    (0.27, shaped(silhouettes)),
    (0.12, shaped(blobs)),
    (0.15, some_texture),
    (0.18, leaves),
)
