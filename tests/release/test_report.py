"""The pages: the guarantee first, nothing from outside, nothing unescaped, and never written into a release."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpdistill.bundle.release import write_bundle
from dpdistill.bundle.report import write_report
from dpdistill.bundle.verification import verify
from dpdistill.errors import InputError, ReleaseError

VOID = {"meta", "img", "link", "br", "hr", "input", "rect"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_the_guarantee_comes_first(pristine: Path) -> None:
    page = Page((pristine / "report.html").read_text())
    certificate = json.loads((pristine / "certificate.json").read_text())
    positions = [
        page.text.index(words)
        for words in (
            certificate["statement"],
            "What it does not cover",
            "The images",
            "The privacy budget",
            "Check it",
        )
    ]
    assert positions == sorted(positions)
    assert len(page.named("h1")) == 1
    for limit in certificate["limits"]:
        assert limit in page.text
    for assumption in certificate["assumptions"]:
        assert assumption["text"] in page.text


def test_the_page_is_one_file_without_scripts_or_addresses(pristine: Path) -> None:
    text = (pristine / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(|javascript:", text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form", "base"} == set()
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "action", "srcset"):
            assert str(attributes.get(name) or "data:").startswith("data:image/png;base64,") or name not in attributes
    policy = next(attributes["content"] for attributes in page.named("meta") if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert "image-rendering: pixelated" in text


def test_the_page_can_be_read_aloud(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic(classes=3, per_class=12)
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made))
    page = Page((out / "report.html").read_text())
    assert page.named("html")[0]["lang"] == "en"
    assert len(page.named("img")) == 30  # ten of each class are shown, and said to be so
    assert all(image["alt"] for image in page.named("img"))
    assert "10 of 12 synthetic images of class eel" in [str(a.get("aria-label")) for a in page.named("div")]
    assert all(svg.get("aria-label") for svg in page.named("svg"))
    assert all(cell.get("scope") for cell in page.named("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["aria-labelledby"] for attributes in page.named("section")} <= set(ids)


def test_names_and_provenance_are_escaped(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic(classes=3)
    names = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}'; --- \u2028")
    known = kit.facts(tmp_path, made, names, auxiliary="</dd><script>alert(2)</script>")
    out = write_bundle(tmp_path / "out", made, known)
    assert verify(out).ok
    page = Page((out / "report.html").read_text())
    assert page.named("script") == []
    assert names[0] in page.text
    assert names[1] in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "alert(2)" in page.text
    assert "<script" not in (out / "README.md").read_text()


def test_a_big_set_makes_a_page_of_bounded_size(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic(classes=200, per_class=6)
    names = tuple(f"class {k}" for k in range(200))
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made, names))
    assert len(Page((out / "report.html").read_text()).named("img")) == 1000


def test_utility_is_shown_outside_the_release_only(bundle: Path, tmp_path: Path) -> None:
    evaluation = {
        "mean": 0.761,
        "std": 0.004,
        "accuracies": [0.757, 0.765],
        "training": {"epochs": 300, "augment": "<b>"},
    }
    write_report(bundle, tmp_path / "page.html", evaluation)
    page = Page((tmp_path / "page.html").read_text())
    assert "76.1 % ± 0.4" in page.text
    assert "0.757, 0.765" in page.text
    assert "<b>" in page.text
    assert "the guarantee does not cover them" in page.text
    assert "Measured utility" not in (bundle / "report.html").read_text()
    assert verify(bundle).ok


@pytest.mark.parametrize(
    "evaluation", [{}, {"mean": float("nan")}, {"a": {"b": {"c": [1, "x", None]}}}, {str(i): i for i in range(500)}]
)
def test_an_evaluation_of_any_keys_is_shown(bundle: Path, tmp_path: Path, evaluation: dict[str, Any]) -> None:
    write_report(bundle, tmp_path / "page.html", evaluation)
    Page((tmp_path / "page.html").read_text())


def test_without_an_evaluation_it_is_the_page_in_the_release(bundle: Path, tmp_path: Path) -> None:
    write_report(bundle, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == (bundle / "report.html").read_bytes()


def test_a_release_is_never_written_to(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    for out in (bundle / "page.html", bundle / "dataset" / "page.html", tmp_path / "link" / "report.html"):
        with pytest.raises(ReleaseError, match="lies in the release"):
            write_report(bundle, out)
    assert verify(bundle).ok


def test_what_cannot_be_shown_is_one_line(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="not an object"):
        write_report(bundle, tmp_path / "page.html", [1])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be written"):
        write_report(bundle, tmp_path / "missing" / "page.html")
    (bundle / "config.toml").write_text("")
    with pytest.raises(ReleaseError, match="SHA256SUMS"):
        write_report(bundle, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_release_that_is_not_private_says_so_first(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic()
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made, run="insecure-1"))
    write_report(out, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.index('class="banner"') < text.index("<main>")
    assert "ε&nbsp;=" not in text
    assert (out / "README.md").read_text().split("---\n", 2)[2].lstrip().startswith("# NOT PRIVATE")
