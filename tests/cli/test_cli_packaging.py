"""Configuration and recipes are found from a checkout and from a wheel, and by the Hydra apps of others."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate

import hydra_plugins.lightning_compress_searchpath as plugin
from lightning_compress import IterativePruning
from lightning_compress.run.shipped import groups, header, summary

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_hooks_use_the_versions_of_the_dev_extra() -> None:
    pinned = dict(word.split("==") for word in project()["project"]["optional-dependencies"]["dev"] if "==" in word)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = {
        re.sub(r"^mirrors-|-pre-commit$", "", name): version
        for name, version in re.findall(r"repo: https://github\.com/[\w-]+/([\w-]+)\n\s+rev: v(\S+)", hooks)
    }
    assert found == pinned
    assert set(pinned) == {"ruff", "mypy", "codespell"}


def test_the_wheel_carries_configuration_and_recipes() -> None:
    wheel = project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"conf": "lightning_compress/conf", "recipes": "lightning_compress/recipes"}
    assert set(wheel["packages"]) == {"lightning_compress", "hydra_plugins"}
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists(), "it is a namespace that packages share"


@pytest.mark.parametrize("checkout", [True, False])
def test_a_checkout_wins_over_a_copy_in_the_package(
    checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lightning_compress"
    (package / "conf").mkdir(parents=True, exist_ok=True)
    if checkout:
        (tmp_path / "conf").mkdir(exist_ok=True)
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(plugin, "find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    assert plugin.shipped_folder("conf") == (tmp_path / "conf" if checkout else package / "conf")


def test_hydra_discovers_the_plugin_once() -> None:
    found = [one.__name__ for one in Plugins.instance().discover(SearchPathPlugin)]
    assert found.count("CompressSearchPath") == 1


@pytest.mark.parametrize("method", sorted(groups()["callbacks/compress"]))
def test_an_app_of_somebody_else_uses_the_groups(method: str, tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("epochs: 3\ncallbacks: {}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("app", overrides=[f"+callbacks/compress=[{method}]"])
    (key,) = config.callbacks  # one top key per file, so that groups merge
    built = instantiate(config.callbacks[key])
    assert config.callbacks[key]._convert_ == "all"
    assert method != "prune" or isinstance(built, IterativePruning)


def test_overrides_reach_into_the_group(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("callbacks: {}\n")
    words = [
        "+callbacks/compress=[prune]",
        "schedule@callbacks.prune.schedule=cosine",
        "callbacks.prune.schedule.final=0.7",
    ]
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        built = instantiate(compose("app", overrides=words).callbacks.prune)
    assert (built.schedule.shape, built.schedule.final) == ("cosine", 0.7)


@pytest.mark.parametrize("group", ["schedule", "select"])
def test_every_choice_of_a_group_builds(group: str, tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("")
    for choice in groups()[group]:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            built = instantiate(compose("app", overrides=[f"+{group}={choice}"])[group])
        assert type(built).__name__.lower() == group


def test_every_choice_says_what_it_is() -> None:
    for group, choices in groups().items():
        for name, path in choices.items():
            assert len(summary(path)) > 15, f"{group}/{name}"
            assert header(path)[0] == summary(path)
