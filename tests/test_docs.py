"""What pages say in words agrees with what the project's files and tables say."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_install_line_brings_what_the_readme_then_uses() -> None:
    (line,) = re.findall(r"`pip install .*?`", README)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "diffusion" in extras
    assert "dpdistill diffusion" in README
    assert "'.[diffusion]'" in line
