"""The writers of small valid data sets, as a fixture."""

from types import ModuleType

import pytest

import small_files


@pytest.fixture(scope="session")
def write() -> ModuleType:
    """tests/helpers/small_files.py."""
    return small_files
