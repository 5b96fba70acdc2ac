"""The README's Python blocks run, and its commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md block {number + 1}", "exec"), {"__name__": "readme"})


def test_there_are_blocks_and_named_things_exist() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(BLOCKS) == 6
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make ([a-z-]+)", text, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)
    recipes = set(re.findall(r"recipes=([a-z0-9_]+)", text))
    assert recipes
    assert all((README.parent / "recipes" / f"{name}.yaml").is_file() for name in recipes)
