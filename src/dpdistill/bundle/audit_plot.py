"""Where the marks of an audit's plots stand, from the certificate's numbers alone. The template draws them as SVG, without a script.

Plain arithmetic on short decimals, written with one decimal: the same text on every machine.
"""

from typing import Any

WIDTH, HEIGHT = 640.0, 200.0  # of a plot, in SVG units
FOOT, HEAD = 34.0, 14.0  # room for the axis below and labels above
LEFT = 8.0
ROW = 44.0  # height of one bound
NAMES = 210.0  # room for the names of the bounds


def _at(value: float) -> str:
    return f"{value:.1f}"


def drawn(audit: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what the template needs: histograms of scores, and bounds on one scale of ε. Empty where there is nothing to draw."""
    if audit is None:
        return {}
    return {"scores": _scores(audit["one_run"]) if audit["one_run"] else None, "bounds": _bounds(audit)}


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    """Two histograms over one axis: canaries that were in, and canaries that were out."""
    n, most = len(found["scores_in"]), max([*found["scores_in"], *found["scores_out"], 1])
    step, floor = (WIDTH - 2 * LEFT) / max(n, 1), HEIGHT - FOOT

    def bars(counts: list[int]) -> list[dict[str, str]]:
        return [
            {"x": _at(LEFT + i * step), "y": _at(floor - tall), "h": _at(tall)}
            for i, tall in enumerate((floor - HEAD) * count / most for count in counts)
            if tall
        ]

    low, high = float(found["score_low"]), float(found["score_high"])
    ticks = [
        {"x": _at(LEFT + (value - low) / (high - low) * (WIDTH - 2 * LEFT)), "text": f"{value:g}"}
        for value in (-1.0, -0.5, 0.0, 0.5, 1.0)
        if low < value < high
    ]
    return {
        "width": _at(WIDTH),
        "height": _at(HEIGHT),
        "floor": _at(floor),
        "label": _at(HEIGHT - 2),
        "bar": _at(step - 1),
        "inside": bars(found["scores_in"]),
        "outside": bars(found["scores_out"]),
        "ticks": ticks,
    }


def _bounds(audit: dict[str, Any]) -> dict[str, Any]:
    """One row a bound: a bar from 0 to what was proved, a band where a correct implementation is expected, and a line at the claim."""
    rows: list[tuple[str, float, tuple[float, float] | None]] = []
    if audit["one_run"]:
        for name, key in (("One run, Steinke et al.", "steinke"), ("One run, f-DP", "fdp")):
            low, high = (float(text) for text in audit["one_run"][f"expected_{key}"])
            rows.append((name, float(audit["one_run"][key]), (low, high)))
    for pair in audit["two_worlds"]:
        rows.append((f"Two worlds, {pair['seen']}", max(float(pair["lower"]), float(pair["lower_gdp"])), None))
    scale = {name: float(k["epsilon"]) for k in audit["kernel"] for name in [_kind(k)]}
    claim = float(audit["epsilon"])
    rows += [(_kind(k), float(k["lower"]) * claim / max(scale[_kind(k)], 1e-9), None) for k in audit["kernel"]]
    top = 1.08 * max([claim, *(bound for _, bound, _ in rows), *(band[1] for _, _, band in rows if band)])
    reach = WIDTH - NAMES - LEFT - 50

    def x(value: float) -> float:
        return NAMES + value / max(top, 1e-9) * reach

    return {
        "width": _at(WIDTH),
        "height": _at(ROW * len(rows) + FOOT),
        "names": _at(NAMES),
        "zero": _at(x(0.0)),
        "claim": _at(x(claim)),
        "floor": _at(ROW * len(rows)),
        "label": _at(ROW * len(rows) + FOOT - 10),
        "rows": [
            {
                "name": name,
                "y": _at(ROW * i + 12),
                "text_y": _at(ROW * i + 12 + 14),
                "band_y": _at(ROW * i + 6),
                "width": _at(x(bound) - x(0.0)),
                "value_x": _at(_clear(max(x(bound), x(band[1]) if band else 0.0) + 6, x(claim))),
                "value": f"{bound:.3g}",
                "band": {"x": _at(x(band[0])), "width": _at(max(x(band[1]) - x(band[0]), 1.0))} if band else None,
            }
            for i, (name, bound, band) in enumerate(rows)
        ],
    }


def _clear(place: float, line: float) -> float:
    """Where a value is written: not across the line of the claim."""
    return line + 6 if line - 34 < place < line + 6 else place


def _kind(found: dict[str, Any]) -> str:
    name = str(found["mechanism"]).replace("_", " ")
    return f"Kernel, {name}" + ("" if found["sampling_prob"] == "1.0" else ", sampled")
