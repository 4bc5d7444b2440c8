"""A stranger checks a release: a flipped byte is caught, a lie under good hashes too, and nothing hostile gets out."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import small_release
from dpdistill.bundle import report, tensors
from dpdistill.bundle import verification as verifier
from dpdistill.bundle.release import write_bundle
from dpdistill.bundle.verification import verify
from dpdistill.errors import ReleaseError
from dpdistill.mechanisms import recordwise


def problems(folder: Path) -> str:
    """The problems of a release that must have some."""
    verdict = verify(folder)
    assert not verdict.ok
    assert verdict.guarantee is None
    assert verdict.problems
    for problem in verdict.problems:
        assert problem.isprintable(), problem
    return "\n".join(verdict.problems)


def test_a_good_release_passes_and_says_what_it_could_not_check(pristine: Path) -> None:
    verdict = verify(str(pristine))
    assert verdict.ok
    assert verdict.problems == ()
    assert "the ledger is complete" in " ".join(verdict.unchecked)
    certificate = json.loads((pristine / "certificate.json").read_text())
    assert str(verdict.guarantee) == certificate["statement"]
    assert certificate["statement"] in (pristine / "README.md").read_text()


def test_sha256sum_agrees(pristine: Path) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum on this machine")
    subprocess.run([tool, "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=pristine, check=True)


def test_verifying_imports_no_torch(pristine: Path) -> None:
    code = (
        "import sys\nfrom dpdistill.bundle.verification import verify\nassert verify(sys.argv[1]).ok\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(pristine)], check=True)


# --- changed bytes under good hashes; any other change: tests/hostile/test_bundles.py


def test_a_byte_changed_under_good_hashes_is_caught(pristine: Path, tmp_path: Path, kit: Any) -> None:
    """Whoever changes it can also write its hash. A check's value, and which version wrote the pages, are claims."""
    folder = Path(shutil.copytree(pristine, tmp_path / "release"))
    raw = (folder / "certificate.json").read_bytes()
    free = [match.span() for match in re.finditer(rb'"(class sums|class counts|pages)": "[^"]*"', raw)]
    for place in range(0, len(raw), 61):
        if any(start <= place < end for start, end in free):
            continue
        (folder / "certificate.json").write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        kit.seal(folder)
        problems(folder)


# --- lies in the certificate, under good hashes


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(certificate: Any) -> None:
        for key in path[:-1]:
            certificate = certificate[key]
        certificate[path[-1]] = value

    return change


LIES = {
    "a smaller ε": (_set("guarantee", "epsilon", value="0.5"), "epsilon is 0.5, the ledger gives"),
    "a smaller replace-one ε": (_set("guarantee", "epsilon_replace_one", value="0.5"), "epsilon_replace_one is 0.5"),
    "a smaller ε of all runs": (_set("guarantee", "epsilon_all_runs", value="0.5"), "epsilon_all_runs is 0.5"),
    "a far larger ε": (_set("guarantee", "epsilon", value="2.9"), "the ledger gives"),
    "less spent": (_set("ledger", "spent_epsilon", value="0.1"), "spent is 0.1"),
    "RDP": (_set("accountant", "rdp_epsilon", value="0.1"), "rdp is 0.1"),
    "a larger δ": (_set("guarantee", "delta", value="0.5"), "the ledger gives"),
    "δ of 1": (_set("guarantee", "delta", value="1.0"), "delta is not in"),
    "ε NaN": (_set("guarantee", "epsilon", value="nan"), "not a number of ours"),
    "ε inf": (_set("guarantee", "epsilon", value="inf"), "not a number of ours"),
    "ε a number": (_set("guarantee", "epsilon", value=1.287), "not what it has to be"),
    "ε in other words": (_set("guarantee", "epsilon", value="1.2870"), "not a number of ours"),
    "a statement": (_set("statement", value="Perfectly private."), "statement is not"),
    "a basis": (_set("guarantee", "basis", value="attested"), "a basis that its claim does not give"),
    "a unit": (_set("guarantee", "unit", value="hospital"), "guarantee.unit"),
    "a relation": (_set("guarantee", "relation", value="replace_one"), "guarantee.relation"),
    "fewer assumptions": (lambda c: c["assumptions"].pop(), "assumptions is not"),
    "no assumptions": (lambda c: c.pop("assumptions"), "assumptions is missing"),
    "fewer limits": (lambda c: c["limits"].pop(), "limits is not"),
    "an unknown key": (_set("signature", value="x"), "signature is unknown"),
    "an unknown inner key": (_set("guarantee", "note", value="x"), "guarantee.note is unknown"),
    "a lost key": (lambda c: c["ledger"].pop("head"), "ledger.head is missing"),
    "a lost claim": (lambda c: c.pop("checks"), "a field is missing"),
    "fewer releases": (lambda c: c["mechanisms"].pop(), "mechanisms is not"),
    "a count": (_set("mechanisms", 0, "count", value=2), "mechanisms[0].count"),
    "a count of another type": (_set("mechanisms", 0, "count", value=True), "mechanisms[0].count"),
    "the head": (_set("ledger", "head", value="0" * 64), "ledger.head"),
    "the lines": (_set("ledger", "lines", value=3), "ledger.lines"),
    "the cap": (_set("ledger", "cap_epsilon", value="1.0"), "ledger.cap_epsilon"),
    "another run": (_set("release", "run", value="run-before"), "did not end"),
    "a run nobody made": (_set("release", "run", value="run-never"), "did not end"),
    "another method": (_set("release", "method", value="dosser"), "another method"),
    "class names": (_set("release", "class_names", value=["cat", "cow"]), "other class names"),
    "a shape": (_set("release", "image_shape", value=[1, 8, 9]), "another shape"),
    "images per class": (_set("release", "per_class", value=3), "not 3 images of every class"),
    "more images": (_set("release", "images", value=5), "release.images"),
    "parts": (_set("release", "parts", value=2), "release.parts"),
    "a gain": (_set("release", "gain", value=2), "release.gain"),
    "a seed of another type": (_set("release", "seed", value=True), "seed is not what"),
    "a seed": (_set("release", "seed", value=8), "not the page"),
    "an auxiliary set": (_set("auxiliary", value="ImageNet"), "not the page"),
    "a version": (_set("software", "torch", value="1.0"), "not the page"),
    "a package": (_set("software", "malware", value="1.0"), "software lists other packages"),
    "numerics": (_set("randomness", "numerics", value="approximate"), "randomness.numerics"),
    "a failed check": (_set("checks", "class sums", value="0.5"), "failed"),
    "a check of no query": (_set("checks", "more", value="0.0"), "a check of no query"),
    "a lost check": (lambda c: c["checks"].pop("class sums"), "no record-wise check of query 'class sums'"),
    "a coarser accountant": (_set("accountant", "discretisation", value="0.1"), "accountant.discretisation"),
    "another format": (_set("format", value="dpdistill-certificate-9"), "not of format"),
    "everything else": (lambda c: c.clear(), "not of format"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_certificate_is_caught(bundle: Path, kit: Any, lie: str) -> None:
    change, reason = LIES[lie]
    kit.edit(bundle, change)
    assert reason in problems(bundle)


def test_what_the_door_lets_pass_verifies(bundle: Path, kit: Any) -> None:
    """It was 1e-4 here and 2e-2 at the door: a run could spend its budget and then have no release."""
    kit.edit(bundle, _set("checks", "class sums", value=repr(recordwise.TOLERANCE)))
    assert verify(bundle).ok
    kit.edit(bundle, _set("checks", "class sums", value=repr(recordwise.TOLERANCE * 1.01)))
    assert "failed" in problems(bundle)


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"null",
        b"\xff\xfe",
        b'{"format": "dpdistill-certificate-1", "format": "dpdistill-certificate-1"}',
        b'{"format": "dpdistill-certificate-1", "x": NaN}\n',
        b'{"format": "dpdistill-certificate-1", "x": 1' + b"0" * 5000 + b"}",
        b'{"format": "dpdistill-certificate-1", "x": 1e999}\n',
        b'{"format": "dpdistill-certificate-1", "x": "\\ud800"}\n',
        b'{"format": "dpdistill-certificate-1"}\n',
    ],
    ids=range(10),
)
def test_hostile_json_is_one_line(bundle: Path, kit: Any, raw: bytes) -> None:
    (bundle / "certificate.json").write_bytes(raw)
    kit.seal(bundle)
    assert "certificate.json" in problems(bundle)


def test_a_repeated_key_is_caught(bundle: Path, kit: Any) -> None:
    path = bundle / "certificate.json"
    path.write_text(path.read_text().replace('"auxiliary":', '"auxiliary": "a",\n  "auxiliary":', 1))
    kit.seal(bundle)
    assert "repeated key" in problems(bundle)


# --- lies in the ledger, its chain whole and the hashes good


def _relay(bundle: Path, kit: Any, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rewrites the ledger, and the certificate's plain facts about it."""
    path = bundle / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_bytes(kit.chain(lines))
    kit.seal(bundle)


def _intent(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next(line for line in lines if line["type"] == "intent" and line["run"].startswith("run-0"))


LEDGERS: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "no end": (lambda lines: lines.pop(), "did not end"),
    "the end twice": (lambda lines: lines.append(lines[-1]), "out of the order"),
    "a charge after the end": (lambda lines: lines.append(_intent(lines)), "out of the order"),
    "a charge before the run": (lambda lines: lines.insert(1, _intent(lines)), "out of the order"),
    "a charge left out": (lambda lines: lines.remove(_intent(lines)), "certificate.json"),
    "a larger noise": (lambda lines: _intent(lines)["query"].update(noise_multiplier="30.0"), "the ledger gives"),
    "past the cap": (lambda lines: _intent(lines)["query"].update(noise_multiplier="0.5"), "passed its cap"),
    "the cap raised too late": (
        lambda lines: (
            _intent(lines)["query"].update(noise_multiplier="0.5"),
            lines.append({"type": "cap", "cap_epsilon": "100.0", "cap_delta": "1e-05"}),
        ),
        "passed its cap of 3 at line",
    ),
    "a sampled one too often": (
        lambda lines: (
            lines[2].update(count=10**12),
            lines[2]["query"].update(sampling_prob="0.0001", noise_multiplier="100000.0"),
        ),
        "ε cannot be computed",
    ),
    "a huge ε": (lambda lines: _intent(lines)["query"].update(noise_multiplier="0.001"), "too much for one accounting"),
    "a count of half": (lambda lines: _intent(lines).update(count=1.9), "ledger"),
    "a count of true": (lambda lines: _intent(lines).update(count=True), "ledger"),
    "a count of zero": (lambda lines: _intent(lines).update(count=0), "ledger"),
    "a count as text": (lambda lines: _intent(lines).update(count="1"), "ledger"),
    "a vast count": (lambda lines: _intent(lines).update(count=10**30), "ledger"),
    "NaN noise": (lambda lines: _intent(lines)["query"].update(noise_multiplier="nan"), "ledger"),
    "noise in other words": (lambda lines: _intent(lines)["query"].update(noise_multiplier="3.00"), "ledger"),
    "a negative dim": (lambda lines: _intent(lines)["query"].update(dim="-4"), "ledger"),
    "a name with a newline": (lambda lines: _intent(lines)["query"].update(name="a\nb"), "ledger"),
    "a query that is text": (lambda lines: _intent(lines).update(query="x"), "ledger"),
    "an unknown mechanism": (lambda lines: _intent(lines)["query"].update(mechanism="laplace"), "ledger"),
    "an unknown type": (lambda lines: lines.append({"type": "note"}), "ledger"),
    "a run that is a list": (lambda lines: _intent(lines).update(run=[]), "ledger"),
    "another relation": (lambda lines: lines[0].update(relation="replace_one"), "ledger"),
    "a unit with markup": (lambda lines: lines[0].update(unit="<b>"), "ledger"),
    "a cap of NaN": (lambda lines: lines[0].update(cap_epsilon="nan"), "ledger"),
    "a small cap": (lambda lines: lines[0].update(cap_epsilon="0.1"), "passed its cap"),
    "another config": (lambda lines: lines[3].update(config="0" * 64), "not the configuration that the ledger names"),
    "another data set": (lambda lines: lines[0].update(data="other"), "ledger.data"),
    "nothing": (lambda lines: lines.clear(), "ledger"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LEDGERS)
def test_a_lie_in_the_ledger_is_caught(bundle: Path, kit: Any, lie: str) -> None:
    change, reason = LEDGERS[lie]
    _relay(bundle, kit, change)
    assert reason in problems(bundle)


def test_a_test_run_cannot_claim_a_guarantee(kit: Any, bundle: Path) -> None:
    _relay(
        bundle,
        kit,
        lambda lines: [line.update(run="insecure-1") for line in lines if line.get("run", "").startswith("run-0")],
    )
    kit.edit(bundle, _set("release", "run", value="insecure-1"))
    assert "came from a given seed" in problems(bundle)


def test_a_release_with_test_noise_fails_and_shows_no_epsilon(kit: Any, tmp_path: Path) -> None:
    made = kit.synthetic()
    out = write_bundle(tmp_path / "out", made, kit.facts(tmp_path, made, run="insecure-abc"))
    assert problems(out).startswith("NOT PRIVATE")
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["guarantee"]["basis"] == "none"
    assert certificate["statement"].startswith("NOT PRIVATE")
    figures = [
        value
        for part in ("guarantee", "accountant", "ledger")
        for key, value in certificate[part].items()
        if "epsilon" in key
    ]
    assert set(figures) == {None}
    for page in ("README.md", "report.html"):
        text = (out / page).read_text()
        assert "NOT PRIVATE" in text
        assert "ε =" not in text.replace("&nbsp;", " ")
    kit.edit(out, _set("guarantee", "basis", value="proved"))
    assert "NOT PRIVATE" not in problems(out)


# --- the other files, under good hashes


@pytest.mark.parametrize(
    "raw", [b"\xff", b"a = ", b'method = "joint"\nepsilon = 1.0\n'], ids=["bytes", "text", "other"]
)
def test_another_config_is_caught(bundle: Path, kit: Any, raw: bytes) -> None:
    (bundle / "config.toml").write_bytes(raw)
    kit.seal(bundle)
    problems(bundle)


@pytest.mark.parametrize("name", ["README.md", "report.html"])
def test_a_page_that_says_more_is_caught(bundle: Path, kit: Any, name: str) -> None:
    path = bundle / name
    path.write_text(path.read_text() + "<script>fetch('https://example.org')</script>")
    kit.seal(bundle)
    assert f"{name}: not the page of this certificate" in problems(bundle)


def test_pages_of_another_version_are_said_to_be_unchecked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "fingerprint", lambda: "0" * 16)
    verdict = verify(bundle)
    assert verdict.ok
    assert any("another version of dpdistill" in item for item in verdict.unchecked)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5, 0.25])
def test_other_images_are_caught(bundle: Path, kit: Any, value: float) -> None:
    path = bundle / "dataset" / "synthetic.safetensors"
    arrays, metadata = tensors.unpack(path.read_bytes())
    images = arrays["images"].copy()
    images[0, 0, 0, 0] = value
    path.write_bytes(tensors.pack({**arrays, "images": images}, metadata))
    kit.seal(bundle)
    problems(bundle)


def test_another_table_is_caught(bundle: Path, kit: Any) -> None:
    path = bundle / "dataset" / "train.parquet"
    table = pq.read_table(path)
    plain = {"compression": "none", "use_dictionary": False}
    flipped = table.set_column(1, "label", pa.array([1 - x for x in table["label"].to_pylist()]))
    secret = table.append_column("secret", pa.array(range(len(table))))
    renamed = table.replace_schema_metadata(
        {"huggingface": table.schema.metadata[b"huggingface"].replace(b"cat", b"cow")}
    )
    for changed in (flipped, secret, renamed, pa.concat_tables([table, table]), table.slice(1)):
        pq.write_table(changed.replace_schema_metadata(changed.schema.metadata or table.schema.metadata), path, **plain)
        kit.seal(bundle)
        assert "train.parquet" in problems(bundle)
    pq.write_table(table, path, compression="zstd")
    kit.seal(bundle)
    assert "compression" in problems(bundle)


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"PAR1" + b"\xff" * 4000 + b"PAR1", b"PAR1" + b"\0" * 5000 + b"PAR1"])
def test_a_broken_table_is_one_line(bundle: Path, kit: Any, raw: bytes) -> None:
    (bundle / "dataset" / "train.parquet").write_bytes(raw)
    kit.seal(bundle)
    assert "train.parquet: not a readable table" in problems(bundle)


def test_what_is_appended_to_a_table_is_named(bundle: Path, kit: Any) -> None:
    path = bundle / "dataset" / "train.parquet"
    path.write_bytes(path.read_bytes() + b"more")
    kit.seal(bundle)
    said = problems(bundle)
    assert "train.parquet: not a readable table (" in said
    assert "InputError" not in said


def test_a_picture_bomb_is_not_inflated(bundle: Path, kit: Any) -> None:
    raw = (bundle / "samples.png").read_bytes()
    body = zlib.compress(b"\0" * 2**28, 9)
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    (bundle / "samples.png").write_bytes(raw[:33] + chunk + raw[-12:])
    kit.seal(bundle)
    assert "samples.png: not the images" in problems(bundle)


# --- hostile folders


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "one more file": lambda folder: (folder / "evil.py").write_text("x"),
    "a hidden file": lambda folder: (folder / ".hidden").write_text("x"),
    "a name with a newline": lambda folder: (folder / "a\nPASS").write_text("x"),
    "a name that is not text": lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff")).write_text("x"),
    "one more in dataset": lambda folder: (folder / "dataset" / "more.parquet").write_text("x"),
    "one more folder": lambda folder: (folder / "model").mkdir(),
    "a folder in dataset": lambda folder: (folder / "dataset" / "inner").mkdir(),
    "a thousand files": lambda folder: [(folder / f"f{i}").touch() for i in range(1000)],
    "one file less": lambda folder: (folder / "README.md").unlink(),
    "no dataset": lambda folder: shutil.rmtree(folder / "dataset"),
    "a link": lambda folder: _replace(folder / "config.toml", lambda path: path.symlink_to("/etc/passwd")),
    "a link to the same bytes": lambda folder: (
        shutil.copy(folder / "config.toml", folder.parent / "c"),
        _replace(folder / "config.toml", lambda path: path.symlink_to(folder.parent / "c")),
    ),
    "a linked folder": lambda folder: (
        shutil.move(folder / "dataset", folder.parent / "d"),
        (folder / "dataset").symlink_to(folder.parent / "d"),
    ),
    "a pipe": lambda folder: _replace(folder / "config.toml", os.mkfifo),
    "a folder for a file": lambda folder: _replace(folder / "config.toml", Path.mkdir),
    "too large": lambda folder: os.truncate(folder / "certificate.json", 2**23),
    "vast and sparse": lambda folder: os.truncate(folder / "dataset" / "train.parquet", 2**40),
    "a path out of the folder": lambda folder: _sums(
        folder, lambda text: text.replace("config.toml", "../config.toml")
    ),
    "an absolute path": lambda folder: _sums(folder, lambda text: text.replace("config.toml", "/etc/passwd")),
    "a line more": lambda folder: _sums(folder, lambda text: text + "0" * 64 + "  /etc/passwd\n"),
    "a line less": lambda folder: _sums(folder, lambda text: text[: text[:-1].rfind("\n") + 1]),
    "lines in another order": lambda folder: _sums(
        folder, lambda text: "\n".join(reversed(text.split("\n")[:-1])) + "\n"
    ),
    "another line ending": lambda folder: _sums(folder, lambda text: text.replace("\n", "\r\n")),
    "capital hashes": lambda folder: _sums(folder, str.upper),
}


def _sums(folder: Path, change: Callable[[str], str]) -> None:
    (folder / "SHA256SUMS").write_bytes(change((folder / "SHA256SUMS").read_text()).encode())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_fails_quietly(bundle: Path, name: str) -> None:
    HOSTILE[name](bundle)
    problems(bundle)


def test_what_is_no_folder_fails_quietly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        problems(tmp_path / name)


def test_a_fault_of_the_checker_itself_is_a_problem_not_a_crash(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(verifier, "check_ledger", broken)
    assert problems(bundle) == "the release cannot be checked (AttributeError)"


@pytest.mark.parametrize(
    "line",
    [
        'method = "ndpc"',
        "delta = 0.001",
        "seed = 77",
        "per_class = 9",
        "attested_epsilon = 0.1",
        "nominal_epsilon = 9.0",
    ],
)
def test_settings_that_contradict_the_certificate(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger binds config.toml; who writes both may still not say two things. What is written is verified first."""
    monkeypatch.setattr(small_release, "TOML", line + "\n")
    with pytest.raises(ReleaseError, match=f"config.toml: says another {line.split()[0]} than the certificate"):
        small_release.write(tmp_path)
