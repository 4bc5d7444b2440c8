"""A tiny release to check and to break."""

import shutil
from functools import cache
from pathlib import Path

import pytest

from dpdistill.privacy import accounting
from small_release import Kit, facts, synthetic, write_bundle


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


_known = cache(accounting.rdp_epsilon)


@pytest.fixture(autouse=True)
def ceiling_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Rényi ceiling of the same charges is computed once: each verdict asks for it twice."""
    monkeypatch.setattr(accounting, "rdp_epsilon", lambda parts, delta: _known(tuple(parts), delta))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good release; read it only."""
    folder = tmp_path_factory.mktemp("pristine")
    made = synthetic()
    return write_bundle(folder / "out", made, facts(folder, made))


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A good release of one's own, to break."""
    return Path(shutil.copytree(pristine, tmp_path / "release"))
