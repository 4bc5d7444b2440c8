"""A few made-up images that any teacher has to answer: shapes, numbers, rows by themselves, and the same twice.

B images in a batch, C channels, H, W size, K classes, P images of the probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpdistill.data.files import no_warnings
from dpdistill.data.procedural import procedural_images
from dpdistill.errors import InputError

with no_warnings():
    pass
from dpdistill.models.teachers.base import BATCH, MODEL_LIMITS, PROBE, RANGE, Run, Teacher, Wants, show


@lru_cache(maxsize=2)
def _drawn(n_images: int, image_shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """The procedural ones, uint8: the same for each of many owners' models."""
    return procedural_images(n_images, *image_shape, seed=seed)


def probe_images(image_shape: tuple[int, int, int]) -> Tensor:
    """Returns made-up images [P, C, H, W] in [-1, 1]: procedural, noise, smooth, black and white. Always the same."""
    c, h, w = image_shape
    rng = np.random.default_rng(0)
    drawn = _drawn(PROBE - 4, image_shape, 0).astype(np.float32) / 127.5 - 1
    noise = rng.uniform(-1, 1, (1, c, h, w)).astype(np.float32)
    ramp = np.broadcast_to(np.linspace(-1, 1, w, dtype=np.float32), (1, c, h, w))
    flat = np.ones((1, c, h, w), np.float32)
    return torch.from_numpy(np.concatenate([drawn, noise, ramp, -flat, flat]))


def varied_images(image_shape: tuple[int, int, int]) -> Tensor:
    """Returns made-up images [128, C, H, W] in [-1, 1], of which a classifier that is fed rightly tells some apart: procedural, flat, and
    blocks of a half, a quarter and an eighth of a side, half of these in black and white. Always the same."""
    c, h, w = image_shape
    drawn = torch.from_numpy(_drawn(64, image_shape, 1)).float() / 127.5 - 1
    g = torch.Generator().manual_seed(0)
    parts = [drawn]
    for cells in (1, 2, 4, 8):
        blocks = torch.rand(16, c, cells, cells, generator=g) * 2 - 1
        if cells > 1:
            blocks[:8] = blocks[:8].sign()
        parts.append(F.interpolate(blocks, size=(h, w)))
    return torch.cat(parts)


def one_class(outputs: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int]) -> bool:
    """Whether one class wins on every one of `varied_images`, as where pixels of 0..1 are fed to a model of 0..255."""
    rows_BK = outputs(varied_images(image_shape))
    return bool(rows_BK.isfinite().all()) and len(rows_BK.argmax(dim=1).unique()) == 1


def probe(
    run: Run,
    source: object,
    name: str,
    image_shape: tuple[int, int, int],
    n_classes: int | None,
    wants: Wants,
    sha256: str,
) -> Teacher:
    """Asks the model about made-up images, and returns it as a teacher if its answers are a classifier's.

    Raises:
      InputError: rows that are missing, not finite, not repeatable, not each image's own, the same for all, or of another K.
    """
    x = probe_images(image_shape)
    first = answer(run, wants.feed(x), source)
    k = first.shape[1]
    if n_classes is not None and k != n_classes:
        raise InputError(
            source, f"returns {k} classes, wanted {n_classes}", "change --classes, or the model's last layer"
        )
    if not 2 <= k <= MODEL_LIMITS.max_classes:
        hint = "a yes-or-no model must return two columns"
        raise InputError(source, f"returns {k} classes, wanted 2 to {MODEL_LIMITS.max_classes:,}", hint)
    scale = max(float(first.abs().max()), 1e-6)
    if not same(first, answer(run, wants.feed(x), source), scale):
        hint = "switch off dropout and other randomness: model.eval()"
        raise InputError(source, "gives two answers to the same images", hint)
    for rows in (slice(0, 1), slice(3, 6)):
        if not same(first[rows], answer(run, wants.feed(x[rows]), source), scale):
            hint = "a network in training mode mixes a batch: model.eval() before export"
            raise InputError(source, "answers an image otherwise when other images are beside it", hint)
    if float((first - first[:1]).abs().max()) <= 1e-6 * scale:
        raise InputError(source, "gives the same answer to every image", RANGE)
    sums = first.sum(1)
    rows_are = bool((first >= -1e-6).all()) and bool(((sums - 1).abs() <= 1e-3).all())
    if wants.outputs == "probabilities" and not rows_are:
        raise InputError(source, "returns rows that are not probabilities", "--set outputs=logits")
    log = wants.outputs == "probabilities" or (wants.outputs is None and rows_are)

    def outputs(x_BCHW: Tensor) -> Tensor:
        if tuple(x_BCHW.shape[1:]) != image_shape:
            raise ValueError(f"Expected images {show(image_shape)}, got {show(x_BCHW.shape[1:])}.")
        if not len(x_BCHW):
            return x_BCHW.new_zeros(0, k)
        rows_BK = torch.cat([rows_of(run, wants.feed(part), source, k) for part in x_BCHW.detach().split(BATCH)])
        rows_BK = without_failures(rows_BK, source)
        return (rows_BK.clamp_min(1e-8).log() if log else rows_BK).to(x_BCHW.device)

    return Teacher(name=name, image_shape=image_shape, n_classes=k, outputs=outputs, sha256=sha256)


def same(a_BK: Tensor, b_BK: Tensor, scale: float) -> bool:
    """Whether two answers agree up to rounding, in a thousandth of the largest."""
    return a_BK.shape == b_BK.shape and float((a_BK - b_BK).abs().max()) <= 1e-3 * scale


def answer(run: Run, x: Tensor, source: object) -> Tensor:
    """Returns the model's rows for a batch, [B, K] float32, finite."""
    rows_BK = rows_of(run, x, source)
    if not rows_BK.isfinite().all():
        raise not_finite(source)
    return rows_BK


def without_failures(rows_BK: Tensor, source: object) -> Tensor:
    """Returns the rows, all equal to 0 where some number is not finite: on a rare image a model may overflow, and says nothing of it.

    Raises:
      InputError: half of the rows or more: it is not the image.
    """
    failed_B = ~rows_BK.isfinite().all(dim=1)
    if 2 * int(failed_B.sum()) >= len(rows_BK):
        raise not_finite(source)
    return rows_BK.masked_fill(failed_B[:, None], 0.0)


def not_finite(source: object) -> InputError:
    return InputError(
        source, "returns values that are not finite", "check --input-low, --input-high, --set mean=… and std=…"
    )


def rows_of(run: Run, x: Tensor, source: object, n_classes: int | None = None) -> Tensor:
    """Returns the model's rows for a batch, [B, K] float32."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a person's model may warn as it likes
            found = run(x)
            rows = found.detach() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    except InputError:
        raise
    except Exception as error:
        reason = f"fails on images {show(x.shape[1:])} ({type(error).__name__})"
        raise InputError(source, reason, "check --shape and --set layout=…") from error
    if not rows.is_floating_point():
        raise InputError(source, f"returns {str(rows.dtype).removeprefix('torch.')}, wanted floats", "return logits")
    if rows.ndim != 2 or len(rows) != len(x) or n_classes not in (None, rows.shape[1]):
        wanted = f"wanted [{len(x)}, {n_classes or 'K'}]"
        raise InputError(
            source, f"returns {list(rows.shape)} for {len(x)} images, {wanted}", "one row of logits for each"
        )
    return rows.float()
