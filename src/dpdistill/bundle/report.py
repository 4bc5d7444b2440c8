"""The page a person reads and the card a hub shows: pure functions of a certificate and the images.

No script, no outside request. `verify` writes both again and compares, so they can say nothing that the certificate
does not. Everything is escaped: class names come from file names.
"""

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from ..errors import ReleaseError
from ..files import write_whole
from ..privacy.guarantee import shown
from . import audit_plot, png
from .certificate import shape
from .contents import Contents, one_line
from .diffusion_product import side_for

_TEMPLATES = Path(__file__).parent / "templates"
ACROSS = 10  # images shown per class
MOST_SHOWN = 1000  # images on a page
MOST_COMPARED, MOST_PAIRS = 2000, 20  # images among which a neighbour is looked for, and classes that show one
_MAX_ROWS = 60


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@functools.cache
def fingerprint() -> str:
    """Names the code and templates that write the pages: those of another fingerprint cannot be compared."""
    digest = hashlib.sha256()
    for path in [
        *sorted(_TEMPLATES.iterdir()),
        *(Path(code) for code in (__file__, png.__file__, audit_plot.__file__)),
    ]:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


def _short(text: str) -> str:
    """A decimal string with four significant digits."""
    return f"{float(text):.4g}"


def _strips(held: Contents) -> list[dict[str, Any]]:
    """For each class its name and its first images as data URIs."""
    across = max(1, min(ACROSS, MOST_SHOWN // len(held.class_names)))
    pixels, strips = held.shown, []
    for k, name in enumerate(held.class_names[:MOST_SHOWN]):
        chosen = np.flatnonzero(held.labels == k)[:across]
        strips.append(
            {
                "name": name,
                "sources": [_uri(pixels[index]) for index in chosen],
                "images": int((held.labels == k).sum()),
            }
        )
    return strips


def _neighbours(held: Contents) -> list[dict[str, Any]]:
    """For each class its first image beside the most similar other released one, and how far apart they are, in grey levels (RMS)."""
    pixels = held.pixels[:MOST_COMPARED]
    flat, rows = pixels.reshape(len(pixels), -1).astype(np.int32), []
    for k, name in enumerate(held.class_names[:MOST_PAIRS]):
        mine = np.flatnonzero(held.labels[: len(flat)] == k)
        if len(mine) and len(flat) > 1:
            squares = np.square(flat - flat[mine[0]]).sum(axis=1, dtype=np.int64)  # whole numbers: the same everywhere
            squares[mine[0]] = np.iinfo(np.int64).max
            other = int(squares.argmin())
            pair = [_uri(pixels[index]) for index in (mine[0], other)]
            apart = f"{(int(squares[other]) / flat.shape[1]) ** 0.5:.1f}"
            rows.append({"name": name, "pair": pair, "of": held.class_names[int(held.labels[other])], "apart": apart})
    return rows


def _beside(certificate: dict[str, Any], held: Contents) -> list[dict[str, Any]]:
    """For the first image of each class what teacher and student answer: a class's name and its probability. Only where the certificate's
    figures hold the teacher's answers, which nobody can check: what is no answer is not shown."""
    figures, names, rows = certificate["figures"], held.class_names, []
    for k, name in enumerate(names[:MOST_PAIRS]):
        mine = np.flatnonzero(held.labels == k)
        said = [float(figures.get(f"teacher_{what}_{k}", -1)) for what in ("class", "probability")]
        if held.soft_labels is None or not len(mine) or not (said[0] in range(len(names)) and 0 <= said[1] <= 1):
            continue
        soft = held.soft_labels[mine[0]]
        answers = [(names[int(said[0])], said[1]), (names[int(soft.argmax())], float(soft.max()))]
        image = _uri(held.shown[mine[0]])
        rows.append({"name": name, "image": image, "answers": [(who, f"{100 * p:.1f} %") for who, p in answers]})
    return rows


def _uri(pixels: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(png.encode(pixels)).decode()


def _bars(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """This run, all runs and the cap, on one scale. All runs are at the cap's own δ if that differs."""
    book, promise = certificate["ledger"], certificate["guarantee"]
    cap = float(book["cap_epsilon"])
    rows = [
        ("This run", promise["epsilon"], promise["delta"], "run"),
        ("All runs", book["spent_epsilon"], book["cap_delta"], "all"),
    ]
    if np.isfinite(cap):
        rows.append(("Cap", book["cap_epsilon"], book["cap_delta"], "cap"))
    top = max([float(epsilon) for _, epsilon, _, _ in rows] + [1e-9])
    return [
        {
            "name": name,
            "epsilon": shown(float(epsilon)),
            "delta": delta,
            "kind": kind,
            "percent": f"{100 * float(epsilon) / top:.1f}",
        }
        for name, epsilon, delta, kind in rows
    ]


def _figures(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """The single values of an evaluation, in its order, as text; lists of numbers on one line."""
    rows: list[tuple[str, str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name} {key}".strip(), inner)
        elif isinstance(value, list):
            add(name, ", ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in value[:20]))
        else:
            rows.append(
                (
                    one_line(name.replace("_", " "), 80),
                    one_line(f"{value:.4g}" if isinstance(value, float) else str(value)),
                )
            )

    add("", evaluation)
    return rows[:_MAX_ROWS]


def _accuracy(evaluation: dict[str, Any]) -> str:
    """ "76.1 % ± 0.4" of an evaluation's `mean` and `std`, or nothing where it has none."""
    mean, std = evaluation.get("mean"), evaluation.get("std")
    if not (isinstance(mean, int | float) and 0 <= mean <= 1):
        return ""
    return f"{100 * mean:.1f} %" + (f" ± {100 * std:.1f}" if isinstance(std, int | float) and 0 < std <= 1 else "")


def render_report(certificate: dict[str, Any], held: Contents, evaluation: dict[str, Any] | None = None) -> str:
    """Returns the page as HTML text.

    Args:
      certificate: from `certificate.build`.
      held: the images.
      evaluation: utility figures to show beside the guarantee, not covered by it; of any keys.
    """
    basis = certificate["guarantee"]["basis"]
    return _environment().get_template("report.html").render(
        c=certificate,
        proved=basis == "proved",
        kept=basis != "none",
        kind=certificate["release"]["kind"],
        cut=_cut(certificate["release"]),
        shape=shape,
        plot=audit_plot.drawn(certificate["audit"]),
        strips=_strips(held),
        neighbours=_neighbours(held) if certificate["release"]["kind"] == "diffusion" else [],
        beside=_beside(certificate, held),
        figures={name: text for name, text in certificate["figures"].items() if not name.startswith("teacher_")},
        bars=_bars(certificate) if basis == "proved" else [],
        short=_short,
        evaluation=_figures(evaluation) if evaluation else [],
        accuracy=_accuracy(evaluation) if evaluation else "",
    )  # fmt: skip


def _cut(release: dict[str, Any]) -> dict[str, int] | None:
    """Size of the images, and side of the squares on which a pipeline draws them, where those are larger."""
    _, height, width = release["image_shape"]
    side = side_for(max(height, width))
    return None if height == width == side else {"height": height, "width": width, "side": side}


def render_card(certificate: dict[str, Any]) -> str:
    """Returns README.md: a Hugging Face data set card, or the card of another kind of release."""
    release, basis = certificate["release"], certificate["guarantee"]["basis"]
    if release["kind"] != "dataset":
        template = _environment().get_template(f"card_{release['kind']}.md")
        return template.render(c=certificate, kept=basis != "none", cut=_cut(release))
    _, height, width = release["image_shape"]
    parts, images = release["parts"], release["images"]
    sizes = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"))
    return _environment().get_template("card.md").render(
        c=certificate,
        proved=basis == "proved",
        size=next((name for top, name in sizes if images < top), "100K<n<1M"),
        simple_tiles=parts == 2 or (height % parts == 0 and width % parts == 0),
    )  # fmt: skip


def write_report(bundle: Path, out: Path, evaluation: dict[str, Any] | None = None) -> None:
    """Writes the page of a release anew, outside it, with the utility figures in `evaluation` if there are any.

    Raises:
      ReleaseError: the release does not verify (one that is NOT PRIVATE is shown, with its banner), or `out` lies in it.
      InputError: `out` cannot be written.
    """
    from .verification import open_release  # verify renders pages too

    if evaluation is not None and not isinstance(evaluation, dict):
        raise ReleaseError("the evaluation is not an object of names and values; give the file that `evaluate` wrote")
    if out.resolve().is_relative_to(bundle.resolve()):
        raise ReleaseError(f"{out} lies in the release, which must not change; choose a place outside {bundle}")
    checked = open_release(bundle)
    write_whole(out, render_report(checked.certificate, checked.contents, evaluation))
