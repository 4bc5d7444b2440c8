"""The page in a real browser: light and dark, narrow and wide. It fits, is readable, and asks nobody for anything.

Speaks the DevTools protocol over Chromium's own pipe, so the test needs the browser and no driver.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpdistill.bundle.release import write_bundle
from dpdistill.bundle.report import write_report
from dpdistill.config import ModelConfig
from dpdistill.conversion import convert
from dpdistill.models.teachers import from_callable

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-sync
  --disable-component-update --disable-extensions --disable-default-apps --no-first-run --no-default-browser-check
  --remote-debugging-pipe"""
# The browser reads commands from descriptor 3 and answers on 4: a launcher puts them there, so we need not fork.
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 13)
os.dup2(int(sys.argv[2]), 14)
os.dup2(13, 3)
os.dup2(14, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, profile: Path) -> None:
        command_read, self._commands = os.pipe()
        self._answers, answer_write = os.pipe()
        arguments = [sys.executable, "-c", LAUNCH, str(command_read), str(answer_write), str(CHROMIUM), *FLAGS.split()]
        self._process = subprocess.Popen(
            [*arguments, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._buffer, self._number, self._session, self.events = b"", 0, "", list[dict[str, Any]]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._commands)
        os.close(self._answers)

    def _message(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._answers, 2**20) if ready else b""
            if not chunk:
                raise TimeoutError("the browser does not answer")
            self._buffer += chunk
        raw, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(raw)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        os.write(
            self._commands,
            json.dumps(command | ({"sessionId": self._session} if self._session else {})).encode() + b"\0",
        )
        while True:
            message = self._message(60)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, page: Path, width: int, scheme: str) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(60))

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self) -> list[str]:
        """Every address the page asked for, whatever came of it."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def painted_hosts(self) -> list[str]:
        """Addresses other than the page itself and its own inline images."""
        return [url for url in self.requests() if not url.startswith(("data:", "file:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, kit: Any) -> dict[str, Path]:
    """The page of a good release, one with hostile class names and figures of utility, one that is not private, and of two students:
    one that inherits a guarantee, and one of the paper's way, which has none."""
    folder = tmp_path_factory.mktemp("pages")
    made = kit.synthetic(classes=10, per_class=10, shape=(3, 8, 8), parts=2, soft=True)
    good = write_bundle(folder / "good", made, kit.facts(folder, made))
    made = kit.synthetic(classes=3)
    names = (
        "<script>document.title='owned'</script>",
        "x" * 100,
        '"><img src=https://example.org/a.png onerror=alert(1)>',
    )
    odd = write_bundle(folder / "odd", made, kit.facts(folder / "a", made, names))
    write_report(
        odd, folder / "odd.html", {"mean": 0.5, "std": 0.01, "note": "<img src=http://example.org>" + "y" * 300}
    )
    open_seed = write_bundle(folder / "seed", made, kit.facts(folder / "b", made, run="insecure-1"))
    found = {"good": good / "report.html", "odd": folder / "odd.html", "not private": open_seed / "report.html"}
    teacher = from_callable(lambda x: x.flatten(1)[:, :3] * 3, image_shape=(1, 8, 8), n_classes=3)
    small = {"steps": 2, "batch": 8, "width": 4, "groups": 2, "generator_width": 4, "latent": 4, "pool": 16}
    for name, word in {
        "student": {"attested_epsilon": 1.0, "attested_delta": 1e-5},
        "no guarantee": {"accept_no_record_guarantee": True},
    }.items():
        config = ModelConfig(teacher="mine", out=str(folder / name), per_class=2, settings=small, **word)  # type: ignore[arg-type]
        found[name] = convert(config, teacher, quiet=True) / "report.html"
    return found


VISIBLE = """(() => {
  const element = document.getElementById('statement'), box = element.getBoundingClientRect();
  return {text: element.innerText, top: box.top, bottom: box.bottom, color: getComputedStyle(element).color,
          background: getComputedStyle(document.body).backgroundColor};
})()"""
OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide, pre') &&
  e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2) of 'rgb(r, g, b)'."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["good", "odd", "not private", "student", "no guarantee"])
def test_the_page_fits_and_asks_nobody(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str, width: int
) -> None:
    browser.open(pages[name], width, scheme)
    assert browser.painted_hosts() == []
    assert "owned" not in browser.value("document.title")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERFLOW) == []
    assert browser.value("document.querySelectorAll('script, link, iframe, object').length") == 0
    assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    seen = browser.value(VISIBLE)
    certificate_says = {
        "not private": "NOT PRIVATE",
        "student": "Not proved here, attested",
        "no guarantee": "NO differential-privacy guarantee",
    }
    assert seen["text"].startswith(certificate_says.get(name, "Adding or removing one record changes"))
    assert 0 < seen["top"] < seen["bottom"] < 900  # on the first screen
    ink, paper = sorted((luminance(seen["color"]), luminance(seen["background"])))[::-1]
    assert (ink + 0.05) / (paper + 0.05) > 7
    assert (luminance(seen["background"]) < 0.2) == (scheme == "dark")
    assert bool(browser.value("document.querySelector('.banner')?.innerText")) == (
        name in ("not private", "no guarantee")
    )
