"""The vault: keys, names, commitments, erasure, and what a fork shares."""

import hashlib
import importlib.util
import os
import shutil
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dpdistill.errors import LedgerError
from dpdistill.mechanisms import Vault
from dpdistill.mechanisms import vault as vaults
from dpdistill.mechanisms.noise import Stream, derive, rounded_gaussian
from dpdistill.mechanisms.vault import write_atomically
from dpdistill.privacy import disk, faults

TOTAL = np.arange(6, dtype=np.int64).reshape(2, 3)


def draw(vault: Vault, total: np.ndarray = TOTAL, release: str = "r", query: bytes = b"q") -> bytes:
    return rounded_gaussian(6, 1e6, vault.noise_stream(release, query, total)).tobytes()


def test_a_fresh_key_from_the_system_for_its_owner_only(tmp_path: Path) -> None:
    first, second = Vault.open(tmp_path / "a"), Vault.open(tmp_path / "b")
    assert first.run != second.run
    assert draw(first) != draw(second)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "key").stat().st_mode & 0o777 == 0o600
    again = Vault.open(tmp_path / "a")
    assert (again.run, draw(again)) == (first.run, draw(first))
    assert (tmp_path / "a" / "key").read_bytes().hex()[:16] not in first.run


def test_noise_depends_on_everything_it_protects(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path)
    other = TOTAL.copy()
    other[1, 2] += 1
    streams = [
        draw(vault),
        draw(vault, other),
        draw(vault, release="s"),
        draw(vault, query=b"p"),
        draw(vault, TOTAL + 0 * other),
    ]
    assert len(set(streams)) == 4
    assert streams[0] == streams[4]
    sample = vault.sampling_stream("r").words(6).tobytes()
    assert sample != vault.sampling_stream("s").words(6).tobytes()
    assert sample != vault.noise_stream("r", b"q", TOTAL).words(6).tobytes()


def test_a_commitment_binds_and_hides(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path)
    assert vault.binds("r", TOTAL)
    assert vault.binds("r", TOTAL)
    assert not vault.binds("r", TOTAL + 1)
    assert vault.binds("s", TOTAL + 1)
    assert not Vault.open(tmp_path).binds("r", TOTAL + 1)
    assert len((tmp_path / "r.commitment").read_bytes()) == 32


def test_saved_sums_come_back_exactly(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path)
    assert vault.load("r") is None
    vault.save("r", TOTAL - 2**50)
    loaded = vault.load("r")
    assert loaded is not None
    assert loaded.dtype == np.int64
    assert np.array_equal(loaded, TOTAL - 2**50)


@pytest.mark.parametrize("content", [b"", b"short", bytes(32), bytes(33)])
def test_a_key_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    """All zeros is what an erasure leaves: a key that everyone knows."""
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(LedgerError, match="not a key"):
        Vault.open(tmp_path)


def test_erased_means_gone(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "v")
    vault.save("r", TOTAL)
    vault.erase()
    assert not (tmp_path / "v").exists()
    for use in (lambda: draw(vault), lambda: vault.sampling_stream("r"), lambda: vault.binds("r", TOTAL)):
        with pytest.raises(ValueError, match="erased"):
            use()
    vault.erase()


@pytest.mark.parametrize("point", range(1, 3))
def test_a_crash_while_erasing_leaves_no_known_key(point: int, tmp_path: Path, forked: Callable[..., bytes]) -> None:
    folder = tmp_path / "v"
    first = Vault.open(folder)
    key = (folder / "key").read_bytes()
    forked(lambda: Vault.open(folder).erase() or b"", kill_at=point)
    assert not (folder / "key").exists()
    second = Vault.open(folder)
    assert second.run != first.run
    assert (folder / "key").read_bytes() not in (key, bytes(32))
    assert all(key not in path.read_bytes() for path in folder.iterdir())


def test_a_crash_while_the_key_is_made_leaves_none_or_a_whole_one(tmp_path: Path, forked: Callable[..., bytes]) -> None:
    for point in (1, 2):
        forked(lambda at=point: Vault.open(tmp_path / f"v{at}").run.encode(), kill_at=point)
        assert len((tmp_path / f"v{point}" / "key").read_bytes() if point == 2 else bytes(32)) == 32
        assert Vault.open(tmp_path / f"v{point}").run == Vault.open(tmp_path / f"v{point}").run


def test_test_noise_says_so_and_shares_no_name(tmp_path: Path) -> None:
    insecure = Vault.open(tmp_path, insecure_seed=3)
    assert insecure.insecure
    assert insecure.run.startswith("insecure-")
    assert not (tmp_path / "key").exists()
    real = Vault.open(tmp_path)
    assert not real.insecure
    assert not real.run.startswith("insecure-")
    assert draw(Vault.open(tmp_path, insecure_seed=3)) == draw(insecure) != draw(Vault.open(tmp_path, insecure_seed=4))


def test_forked_children_share_noise_only_for_the_same_sum(tmp_path: Path, forked: Callable[..., bytes]) -> None:
    """Key per release and sum: a fork copies no generator state that two children could both go on from."""
    vault = Vault.open(tmp_path)
    same = [forked(lambda: draw(vault)) for _ in range(2)]
    other = [forked(lambda i=i: draw(vault, TOTAL + i)) for i in (1, 2)]
    assert same[0] == same[1] == draw(vault)
    assert len({same[0], *other}) == 3
    first, second = (np.frombuffer(raw, np.int64) for raw in other)
    assert not (first == second).any()


def test_atomic_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError):
            write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    write_atomically(path, b"three")
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def forked() -> Callable[..., bytes]:
    """Runs work() in a child and returns its bytes; with kill_at, the child dies at that numbered point and nothing comes back."""

    def run(work: Callable[[], bytes], kill_at: int = 0) -> bytes:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                faults._passed = 0
                os.environ["DPDISTILL_KILL_AT"] = str(kill_at)
                raw = work()
                os.write(writer, struct.pack("<q", len(raw)) + raw)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            raw = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == bool(kill_at)
        return raw[8:]

    return run


def test_every_stream_has_a_label_of_its_own(tmp_path: Path) -> None:
    """What a run derives from its key, by hand: a resumed run must derive the same, and no two purposes may share a stream."""
    key = b"k" * 32
    (tmp_path / "key").write_bytes(key)
    vault = Vault.open(tmp_path)
    assert (vault.run, vault.folder) == ("run-" + derive(key, "name").hex()[:16], tmp_path)
    assert vault.insecure is False
    digest = hashlib.sha256(TOTAL.tobytes()).digest()
    streams = {
        vault.sampling_stream("r").words(2).tobytes(): ("sample", vault.run, "r"),
        vault.noise_stream("r", b"q", TOTAL).words(2).tobytes(): ("noise", vault.run, "r", b"q", digest),
    }
    for drawn, labels in streams.items():
        assert drawn == Stream(derive(key, *labels)).words(2).tobytes()
    assert vault.binds("r", TOTAL)
    assert (tmp_path / "r.commitment").read_bytes() == derive(key, "commit", vault.run, "r", digest)
    known = Vault.open(tmp_path / "x", insecure_seed=3)
    seed = derive(b"insecure", "3")
    assert (known.run, known.folder, known.insecure) == ("insecure-" + seed.hex()[:16], tmp_path / "x", True)
    assert known.sampling_stream("r").words(1) == Stream(derive(seed, "sample", known.run, "r")).words(1)


def test_folders_above_are_made_and_nothing_is_pickled(tmp_path: Path) -> None:
    vault = Vault.open(tmp_path / "a" / "b")
    assert Vault.open(tmp_path / "a" / "b").run == vault.run
    odd = np.array([LedgerError], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        vault.save("r", odd)
    np.save(tmp_path / "a" / "b" / "r.npy", odd, allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        vault.load("r")


def test_elsewhere_there_is_no_key() -> None:
    away = Vault.elsewhere()
    assert (away.folder, away.run, away._key, away.insecure) == (Path(os.devnull), "", b"", False)


def test_what_is_on_disk_before_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    def spied(name: str, note: Callable[..., object]) -> None:
        real = getattr(vaults, name)
        monkeypatch.setattr(vaults, name, lambda *facts, **more: (events.append(note(*facts)), real(*facts, **more))[1])

    spied("sync_directories", lambda path: ("sync all", path.name, (path / "key").exists()))
    spied("sync_directory", lambda path: ("sync", path.name, sorted(os.listdir(path))))
    spied("write_atomically", lambda path, content: ("write", path.name))
    spied("overwrite", lambda path: ("overwrite", path.name, path.exists()))
    spied("point", lambda name: name)
    vault = Vault.open(tmp_path / "v")
    (tmp_path / "v" / "key.erased").write_bytes(b"old")
    Vault.open(tmp_path / "v")
    assert events == [
        ("overwrite", "key.erased", False),
        ("sync all", "v", False),
        ("write", "key"),
        ("sync", "v", ["key"]),
        ("overwrite", "key.erased", True),
        ("sync", "v", ["key", "key.erased"]),
    ]
    assert (tmp_path / "v" / "key.erased").read_bytes() == bytes(32)
    (tmp_path / "v" / "key.erased").unlink()
    events.clear()
    left: list[tuple[str, bytes]] = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder, ignore_errors: left.extend((p.name, p.read_bytes()) for p in folder.iterdir())
    )
    vault.erase()
    assert events == [
        ("sync", "v", ["key.erased"]),
        "vault: key set aside",
        ("overwrite", "key.erased", True),
        "vault: key overwritten",
    ]
    assert left == [("key.erased", bytes(32))]
    assert vault._key == b""
    vault.erase()  # again, where a crash came between


# What reaches the disk, and in which order: privacy/disk.py.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[object, ...]]]:
    """Every fsync, with the path and the content that it makes last, and every rename and point, in order. No descriptor stays open."""
    noted: list[tuple[object, ...]] = []
    fsync, replace, before = os.fsync, os.replace, len(os.listdir("/proc/self/fd"))

    def spy_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        noted.append(("fsync", path, sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (noted.append(("rename", a, b)), replace(a, b))[1])
    monkeypatch.setattr(disk, "point", lambda name: noted.append(("point", name)))
    yield noted
    assert len(os.listdir("/proc/self/fd")) == before


def test_written_beside_then_renamed(tmp_path: Path, calls: list[tuple[object, ...]]) -> None:
    path, beside = tmp_path / "x", tmp_path / "x.partial"
    beside.write_bytes(b"left by a crash, and longer")
    beside.chmod(0o600)
    for content in (b"one", b"two"):
        before = os.umask(0)
        try:
            write_atomically(path, content)
        finally:
            os.umask(before)
        assert path.read_bytes() == content
        assert path.stat().st_mode & 0o777 == 0o600
        assert calls == [
            ("fsync", beside, content),
            ("point", "file: written beside, not yet renamed"),
            ("rename", beside, path),
            ("fsync", tmp_path, ["x"]),
            ("point", "file: in place"),
        ]
        calls.clear()


def test_zeros_over_a_key_and_no_further(tmp_path: Path, calls: list[tuple[object, ...]]) -> None:
    disk.overwrite(tmp_path / "none")
    assert calls == []
    assert os.listdir(tmp_path) == []
    path = tmp_path / "key"
    for content in (b"k" * 32, b"k" * 33):
        path.write_bytes(content)
        disk.overwrite(path)
        assert calls.pop() == ("fsync", path, bytes(32) + content[32:])
        assert path.read_bytes() == bytes(32) + content[32:]


def test_a_folder_and_all_above_it_in_its_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(deep)
    synced: list[Path] = []
    monkeypatch.setattr(disk, "sync_directory", synced.append)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "a")
    disk.sync_directories(deep)
    assert synced == [deep, tmp_path / "a"]  # the name of a mount is in another file system
    synced.clear()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == Path("/"))
    disk.sync_directories(tmp_path / "link")
    assert synced == [deep, *deep.parents]

    def not_ours(path: Path) -> None:
        synced.append(path)
        if path in refused:
            raise PermissionError(13, "Permission denied")

    refused = [tmp_path / "a", tmp_path.parent]
    synced.clear()
    monkeypatch.setattr(disk, "sync_directory", not_ours)
    disk.sync_directories(deep)
    assert synced == [deep, *deep.parents]
    refused = [deep]
    with pytest.raises(PermissionError):
        disk.sync_directories(deep)
    monkeypatch.setattr(disk, "sync_directory", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync_directories(deep)


def test_a_failure_names_the_file(
    tmp_path: Path, calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself an fsync that fails names none; and nothing is renamed after one, nor left open."""
    path = tmp_path / "x"
    path.write_bytes(b"k" * 32)

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    for work, named in (
        (lambda: write_atomically(path, b"new"), path),
        (lambda: disk.overwrite(path), path),
        (lambda: disk.sync_directory(tmp_path), tmp_path),
        (lambda: disk.sync_directories(tmp_path), tmp_path),
    ):
        with pytest.raises(OSError, match="Input/output error") as caught:
            work()
        assert caught.value.filename == str(named)
    assert calls == []


def test_points_are_numbered_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the point that is asked for, once, and nowhere where none is."""
    found = importlib.util.find_spec("dpdistill.privacy.faults")
    assert found is not None
    assert found.loader is not None
    fresh = importlib.util.module_from_spec(found)
    found.loader.exec_module(fresh)
    monkeypatch.setattr(faults, "_passed", 0)
    killed: list[tuple[object, ...]] = []
    monkeypatch.setattr(os, "kill", lambda *facts: killed.append((*facts, passed)))
    monkeypatch.setenv("DPDISTILL_POINTS", str(tmp_path / "points"))
    for module in (faults, fresh):
        for kill_at in ("2", None):
            monkeypatch.setenv("DPDISTILL_KILL_AT", kill_at) if kill_at else monkeypatch.delenv("DPDISTILL_KILL_AT")
            for passed in ("a", "b", "c"):
                module.point(passed)
    assert killed == [(os.getpid(), signal.SIGKILL, "b")] * 2
    assert (tmp_path / "points").read_text() == "a\nb\nc\n" * 4
    monkeypatch.delenv("DPDISTILL_POINTS")
    faults.point("d")
    assert "d" not in (tmp_path / "points").read_text()
