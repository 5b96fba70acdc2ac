"""Any error of a run as one line: the argument, what was expected, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lightning_compress.core.errors import CompressionError, did_you_mean
from lightning_compress.run.shipped import config_folder, groups, recipe_files

_NOT_FOUND = re.compile(r"Could not (?:override|delete|append)(?: from config\.| to config\.)? '([^']+)'")


def explain(error: BaseException, words: Sequence[str]) -> str:
    r"""Return one line about an error.

    Args:
        error: Whatever was raised while composing, building or running.
        words: The command's arguments.

    Returns:
        A line without line breaks.

    >>> explain(ValueError("too\n  bad"), [])
    'ValueError: too bad'
    """
    for cause in _chain(error):
        text = _explain_one(cause, words)
        if text:
            return " ".join(text.split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain_one(error: BaseException, words: Sequence[str]) -> str:
    if isinstance(error, CompressionError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(str(error.missing_cfg_file), words)
    if isinstance(error, OverrideParseException):
        return _bad_grammar(error)
    if isinstance(error, ConfigCompositionException):
        return _composition(error, words)
    if isinstance(error, OmegaConfBaseException):
        return _value(error)
    if isinstance(error, HydraException):
        return str(error)
    return ""


def _missing_choice(name: str, words: Sequence[str]) -> str:
    group, _, choice = name.rpartition("/")
    choice = choice.removesuffix(".yaml")
    if not group:
        return f"`--config-name`: there is no configuration {choice!r}"
    return f"`{group}={choice}`: there is no such choice; {did_you_mean(choice, groups().get(group, {}))}"


def _bad_grammar(error: OverrideParseException) -> str:
    word = error.override
    if "=" not in word and not word.startswith("~"):
        options = {name: f"recipes={name}" for name in recipe_files()}
        near = did_you_mean(word, options)
        hint = f"for a recipe write recipes=NAME ({near})"
        return f"`{word}` is not of the form key=value; {hint}"
    first = next((line for line in error.message.splitlines() if not line.startswith(("Error parsing", "See "))), "")
    key, _, value = word.partition("=")
    if "=" in value and not value.startswith(("'", '"', "[", "{")):  # as in the names of Lightning's checkpoints
        return f"`{word}` cannot be read as key=value, its value has an equals sign; write '{key}=\"{value}\"'"
    return f"`{word}` cannot be read as key=value ({first}); quote lists, brackets and spaces, as in 'key=[\"a*\"]'"


def _composition(error: ConfigCompositionException, words: Sequence[str]) -> str:
    text = str(error)
    if text.startswith("Ambiguous value"):
        word = text.split("'")[1]
        key, _, value = word.partition("=")
        return f"`{word}`: several values need -m for a sweep, or brackets for one list: {key}=[{value}]"
    found = _NOT_FOUND.search(text)
    if found:
        return _unknown_key(found.group(1), words, error.__cause__)
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return f"{text.splitlines()[0] if text else 'the configuration'}: {_value(cause)}"
    twice = re.match(r"(\S+) appears more than once", text)
    if twice:
        return f"`{twice.group(1)}` is chosen already; without the plus, {twice.group(1)}=NAME changes the choice"
    return text


def _unknown_key(key: str, words: Sequence[str], cause: BaseException | None = None) -> str:
    """Say which part of a dotted key does not exist, and what does at that place."""
    if "/" in key or "@" in key:
        group = key.partition("@")[0]
        options = _defaults(words) if "@" in key or group in groups() else list(groups())
        return f"`{key}` is not a configuration group in use; {did_you_mean(key, options)}"
    node: Any = _composed(key, words)
    parts = key.split(".")
    for index, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            options = list(dict.fromkeys(_children(node) + (list(groups()) if index == 0 else [])))
            place = ".".join(parts[:index])
            where = f"`{place}` has no {part!r}" if place else f"there is no {part!r}"
            return f"`{key}`: {where}; {did_you_mean(part, options)}{_add_hint(key, node)}"
        node = OmegaConf.select(node, part, throw_on_resolution_failure=False)
    if isinstance(cause, OmegaConfBaseException):  # the key exists, but not what the mapping given for it holds
        reason = str(cause).splitlines()[0]
        return f"`{key}`: {reason}; set its entries one by one, new ones with a plus: +{key}.NAME=VALUE"
    return f"`{key}` is not a known key"


def _add_hint(key: str, node: Any) -> str:
    """Mention ``+`` only below a target, where an argument may exist without being listed."""
    return f" (+{key} adds an argument that is not listed)" if _has_target(node) else ""


def _has_target(node: Any) -> bool:
    return isinstance(node, DictConfig) and "_target_" in node


def _children(node: Any) -> list[str]:
    return [str(key) for key in node if key != "_target_"] if isinstance(node, DictConfig) else []


def _composed(key: str, words: Sequence[str]) -> DictConfig:
    """Return the configuration without the override that failed, or the default one."""
    usable = [word for word in words if "=" in word and not word.startswith("-") and not _is_about(word, key)]
    for overrides in (usable, [word for word in usable if word.startswith("recipes=")], []):
        try:
            with initialize_config_dir(str(config_folder()), version_base="1.3"):
                return compose("config", overrides=overrides, return_hydra_config=key.startswith("hydra"))
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return OmegaConf.create()


def _is_about(word: str, key: str) -> bool:
    return word.lstrip("+~").partition("=")[0] == key


def _defaults(words: Sequence[str]) -> list[str]:
    config = _composed("hydra.", words)
    choices = OmegaConf.select(config, "hydra.runtime.choices") or {}
    return [str(name) for name in choices if not str(name).startswith("hydra/")]


def _value(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    where = f"`{key}`: " if key else ""
    if isinstance(error, MissingMandatoryValue):
        return f"`{key}` has no value yet; give one with {key}=VALUE"
    if isinstance(error, InterpolationKeyError | InterpolationResolutionError):
        return f"{where}{first}; `${{...}}` must name an existing key"
    return f"{where}{first}"
