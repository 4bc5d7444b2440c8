"""Tampered releases of every kind: bytes changed all over each file, cuts, and each file that is something else fail in printable lines."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import small_release
from dpdistill import cli
from dpdistill.bundle import verification as verifier
from dpdistill.bundle.verification import verify

KINDS = ("dataset", "model", "diffusion")
MOST = {
    "dataset": 2**13,
    "model": 256,
    "diffusion": 128,
}  # places in a file: every byte, or so many evenly spread in a longer one


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: small_release.write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def release(kind: str, releases: dict[str, Path]) -> Path:
    """A good release; read it only."""
    return releases[kind]


def fails(folder: Path) -> str:
    """The problems of a release that must have some."""
    verdict = verify(folder)
    assert not verdict.ok
    assert verdict.guarantee is None
    assert verdict.problems
    assert all(problem.isprintable() for problem in verdict.problems)
    return "\n".join(verdict.problems)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def places(length: int, most: int) -> Iterator[int]:
    """Every place in a short file; in a long one places all over it, its ends among them."""
    yield from range(0, length, -(-length // most))
    yield from range(max(0, length - 16), length)


def test_the_releases_are_good(release: Path) -> None:
    assert verify(release).ok


def test_a_changed_byte_fails_wherever_it_is(kind: str, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory: what is on disk is read in one place, and that is tested below."""
    files = verifier.read_files(release)
    monkeypatch.setattr(verifier, "read_files", lambda root: files)
    assert verify(release).ok
    for name in names(release):
        raw = files[name]
        for place in places(len(raw), MOST[kind]):
            changed = bytearray(raw)
            changed[place] ^= 1 << place % 8
            files[name] = bytes(changed)
            assert "hash" in fails(release) or name == "SHA256SUMS", (name, place)
        files[name] = raw
    assert verify(release).ok


def test_a_file_that_ends_too_soon_fails_wherever_it_ends(
    kind: str, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = verifier.read_files(release)
    monkeypatch.setattr(verifier, "read_files", lambda root: files)
    for name in names(release):
        raw = files[name]
        for end in places(len(raw), MOST[kind] // 16):
            files[name] = raw[:end]
            fails(release)
        for tail in (b"\0", b"\n", raw):
            files[name] = raw + tail
            fails(release)
        files[name] = raw
    assert verify(release).ok


def linked(path: Path) -> None:
    """A link to the very bytes that were there."""
    shutil.copy(path, path.parents[3] / "aside")
    path.unlink()
    path.symlink_to(path.parents[3] / "aside")


INSTEAD: dict[str, Callable[[Path], object]] = {
    "nothing": Path.unlink,
    "a link to the same bytes": linked,
    "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a byte on disk": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "a cut on disk": lambda path: os.truncate(path, path.stat().st_size // 2),
    "no bytes": lambda path: os.truncate(path, 0),
    "2^40 bytes": lambda path: os.truncate(path, 2**40),
}


@pytest.mark.parametrize("what", INSTEAD)
def test_something_else_in_the_place_of_a_file_fails(release: Path, tmp_path: Path, what: str) -> None:
    for number, name in enumerate(names(release)):
        folder = Path(shutil.copytree(release, tmp_path / str(number) / "a" / "b"))
        (folder / "x" / "y").mkdir(parents=True)
        shutil.rmtree(folder / "x")
        INSTEAD[what](folder / name)
        fails(folder)


@pytest.mark.parametrize(
    "name", ["evil.py", "dataset/more.bin", "pipeline/transformer/model.bin", "model/x", ".git/config"]
)
def test_a_file_more_fails_at_any_depth(release: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(release, tmp_path / "r"))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert "not a file of a release" in fails(folder)


USES = (["audit", "r"], ["report", "r"], ["sample", "r", "--out", "s"], ["evaluate", "r", "--data", "digits"])


@pytest.mark.parametrize("name", ["extra", "README.md"])
def test_who_uses_a_tampered_release_is_told_which_and_what_to_do(
    name: str,
    releases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(releases["diffusion"], tmp_path / "r"))
    (folder / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for words in USES:
        monkeypatch.setattr("sys.argv", ["dpdistill", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert line.startswith("dpdistill: r: ")
        assert line.endswith("(give a release folder as it was made; `dpdistill verify` says more)")
    assert os.listdir(tmp_path) == ["r"]


def test_files_that_are_too_much_together_are_not_read(releases: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(releases["model"], tmp_path / "r"))
    for name in ("dataset/train.parquet", "dataset/synthetic.safetensors", "model/student.onnx"):
        os.truncate(folder / name, 2**28)  # each may be so long
    assert "more than 536,870,912 bytes" in fails(folder)


@pytest.mark.parametrize(
    "text", ["a" + ".a" * 30_000 + " = 1", "a = " + "[" * 10_000, "\ufeffa = 1", "a = 0x" + "F" * 10_000 + "\x00"]
)
def test_settings_that_blow_up_a_parser_fail(releases: dict[str, Path], tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(releases["dataset"], tmp_path / "r"))
    (folder / "config.toml").write_text(text)
    small_release.Kit.seal(folder)
    assert "config.toml" in fails(folder)
