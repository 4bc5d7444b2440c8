"""How large or small a setting may be: beyond, a run can only end in what is no number, when its releases have been paid for."""

from typing import Any

from ...errors import ConfigError

Bounds = tuple[float, float]

NORMS: Bounds = (1e-6, 1e6)  # of clipping, of scales and sizes
SCALES: Bounds = (1e-3, 1e3)  # of pixels, whose squares are squared again
RATES: Bounds = (1e-9, 1e3)  # of learning
DIMS: Bounds = (1, 4096)  # of what is squared in memory, or the width of a network
PIXEL_DIMS: Bounds = (1, 1024)  # of a mixture: 256 records at once have the products of every two, half a gigabyte
WEIGHTS: Bounds = (0.0, 1e6)  # of a term beside others; 0 leaves it out
MOST_PARTS = 16  # along a side, as `bundle.contents` has it


def check_bounds(config: Any, bounds: Bounds, *names: str) -> None:
    """Raises ConfigError unless each of these settings is within the bounds (NaN never is). One that is None is left open."""
    low, high = bounds
    for name in names:
        value = getattr(config, name)
        if value is not None and not (low <= value <= high):
            raise ConfigError(f"Expected {name} from {low:g} to {high:g}, got {value}.")


def check_parts(parts: int, image_shape: tuple[int, int, int]) -> None:
    """Raises ConfigError unless an image of this shape can hold parts x parts training images."""
    most = min(MOST_PARTS, *image_shape[1:])
    if not (1 <= parts <= most):
        raise ConfigError(
            f"Expected parts from 1 to {most}: of a side of the images, {MOST_PARTS} at most; got {parts}."
        )
