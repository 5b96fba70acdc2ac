"""The resolved configuration as plain, checked values: nothing is built here, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.run.exporting import read_export
from lightning_compress.run.targets import check_node, check_targets

BASELINE_NAMES = ("baseline", "train")
STAGE_KEYS = ("trainer", "optimizer", "scheduler", "callbacks", "apply", "fresh", "student", "rounds")


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a ``Trainer.fit`` with its own optimizer, or post-training methods.

    Args:
        key: Of the stage in ``stages``.
        name: The same, with the number of the round in a stage that has several.
        trainer: Arguments of the Trainer that differ from the common ones.
        optimizer: ``_target_`` and arguments of an optimizer; ``None`` takes the module's own.
        scheduler: ``_target_`` and arguments of a learning-rate scheduler for ``optimizer``, and ``interval``.
        callbacks: Names in the top-level ``callbacks`` that take part in this fit.
        apply: Names in the top-level ``callbacks`` that are applied once, without training.
        fresh: Whether it begins with a module built anew, as the first stage does.
        student: ``_target_`` and arguments of another module, which this stage begins with and later ones go on with.
        round: Number of the round, from 1.
        rounds: How many there are: one fit after the other, each with an optimizer of its own; callbacks hand on state.
    """

    key: str
    name: str
    trainer: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None
    scheduler: Mapping[str, Any] | None
    callbacks: tuple[str, ...]
    apply: tuple[str, ...]
    fresh: bool = False
    student: Mapping[str, Any] | None = None
    round: int = 1
    rounds: int = 1

    @property
    def title(self) -> str:
        """How a plan speaks of it."""
        return self.key if self.rounds == 1 else f"{self.key}, {self.rounds} rounds of which this is the first"


@dataclass(frozen=True)
class Settings:
    """Everything a run needs, as builtins.

    Args:
        recipe: Name of the recipe.
        seed: Seed of everything random.
        threads: CPU threads of torch, or ``None`` for its own choice.
        model: ``module`` (a ``_target_``), ``checkpoint`` and ``pretrained`` (paths or ``None``).
        data: A ``_target_``: the data module.
        trainer: A ``_target_``: the Trainer.
        task: A ``_target_``: what to do.
        callbacks: Named callbacks, each a ``_target_``.
        stages: In order.
        baseline_after: The stage whose end is the baseline; ``None`` when there is no stage.
        checkpoint: ``every_n_epochs`` and ``every_n_steps``.
        report: ``latency``, ``batch_size`` and ``threads`` of what is measured at the end.
        export: What :func:`~lightning_compress.run.exporting.read_export` made of ``export``.
        raw: All of it, as it is written to the run's folder.
    """

    recipe: str
    seed: int
    threads: int | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]
    task: Mapping[str, Any]
    callbacks: Mapping[str, Mapping[str, Any]]
    stages: tuple[Stage, ...]
    baseline_after: str | None
    checkpoint: Mapping[str, Any]
    report: Mapping[str, Any]
    export: Mapping[str, Any] | None
    raw: Mapping[str, Any]


def read_settings(config: DictConfig) -> Settings:
    """Resolve and check a composed configuration.

    Args:
        config: What Hydra composed, or what a run saved.

    Returns:
        Builtins only, every interpolation resolved, every ``_target_`` importable and given arguments it knows.

    Raises:
        ConfigurationError: If a key, a reference or an argument is not known, or a value has the wrong type.
    """
    content = cast(dict[Any, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    raw: dict[str, Any] = {str(key): value for key, value in content.items()}
    known = {field.name for field in fields(Settings)} - {"raw"}
    raw.setdefault("export", None)  # runs of earlier releases did not have it
    _check_keys("", raw, known | {"variables"}, required=known)
    seed = raw["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigurationError(f"`seed` must be a whole number in [0, 2**32), got {seed!r}")
    _check_count("threads", raw["threads"])
    for key in ("model", "data", "trainer", "task", "callbacks", "stages", "checkpoint", "report"):
        _check_mapping(key, raw[key])
    _check_keys("model", raw["model"], {"module", "checkpoint", "pretrained"}, required={"module"})
    _check_numbers(raw["checkpoint"], raw["report"])
    check_targets(raw)
    stages = tuple(
        stage for key, value in raw["stages"].items() for stage in _read_stage(str(key), value, raw["callbacks"])
    )
    names = [stage.name for stage in stages]
    for stage in stages:
        if names.count(stage.name) > 1:
            raise ConfigurationError(
                f"`stages.{stage.name}` has the name of a round of another stage; call it otherwise"
            )
        check_node(f"stages.{stage.key}.trainer", {**raw["trainer"], **stage.trainer})
    baseline_after = _baseline_after(raw["baseline_after"], stages)
    for stage in stages[: names.index(baseline_after) + 1] if baseline_after else ():
        if stage.student is not None:
            raise ConfigurationError(
                f"`stages.{stage.key}.student` comes before there is a baseline to compare it with; let the stage that "
                "`baseline_after` names train `model.module` first"
            )
    return Settings(
        **{key: raw[key] for key in known - {"stages", "baseline_after", "export"}},
        export=read_export(raw["export"]),
        stages=stages,
        baseline_after=baseline_after,
        raw=raw,
    )


def _check_mapping(where: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"`{where}` must be a mapping, got {value!r}")


def _check_keys(where: str, value: Mapping[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    known = sorted(known)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in known:
            raise ConfigurationError(f"`{prefix}{key}` is not a known key; {did_you_mean(str(key), known)}")
    for key in sorted(required):
        if key not in value:
            raise ConfigurationError(f"`{prefix}{key}` is missing from the configuration")


def _check_numbers(checkpoint: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    _check_keys("checkpoint", checkpoint, ("every_n_epochs", "every_n_steps"))
    for key, number in checkpoint.items():
        _check_count(f"checkpoint.{key}", number)
    _check_keys("report", report, ("latency", "batch_size", "threads"), required=("latency", "batch_size", "threads"))
    for key in ("batch_size", "threads"):
        _check_count(f"report.{key}", report[key], optional=False)
    if not isinstance(report["latency"], bool):
        raise ConfigurationError(f"`report.latency` must be true or false, got {report['latency']!r}")


def _check_count(where: str, number: Any, optional: bool = True) -> None:
    if (number is None and optional) or (isinstance(number, int) and not isinstance(number, bool) and number >= 1):
        return
    either = " or null" if optional else ""
    raise ConfigurationError(f"`{where}` must be a whole number of at least 1{either}, got {number!r}")


def _read_stage(key: str, value: Any, callbacks: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return a stage, or one for each of its rounds."""
    where = f"stages.{key}"
    _check_mapping(where, value)
    _check_keys(where, value, STAGE_KEYS)
    rounds = value.get("rounds", 1)
    _check_count(f"{where}.rounds", rounds, optional=False)
    stage = Stage(
        key=key,
        name=key,
        trainer=value.get("trainer") or {},
        optimizer=value.get("optimizer"),
        scheduler=value.get("scheduler"),
        callbacks=_references(f"{where}.callbacks", value.get("callbacks"), callbacks),
        apply=_references(f"{where}.apply", value.get("apply"), callbacks),
        fresh=value.get("fresh", False),
        student=value.get("student"),
    )
    _check_mapping(f"{where}.trainer", stage.trainer)
    if not isinstance(stage.fresh, bool) or (stage.fresh and (rounds > 1 or stage.apply)):
        raise ConfigurationError(
            f"`{where}.fresh` must be true or false, and true only for a single fit; got {stage.fresh!r}"
        )
    if stage.student is not None and (stage.fresh or rounds > 1 or stage.apply):
        raise ConfigurationError(
            f"`{where}.student` begins a single fit with another module: leave out `fresh`, `rounds`"
        )
    for name in ("optimizer", "scheduler", "student"):
        part = value.get(name)
        if part is not None and (not isinstance(part, Mapping) or "_target_" not in part):
            raise ConfigurationError(f"`{where}.{name}` must be a mapping with a `_target_`, or null; got {part!r}")
    if stage.scheduler is not None and stage.optimizer is None:
        raise ConfigurationError(f"`{where}.scheduler` needs `{where}.optimizer`; the module's own keeps its own")
    if stage.apply and (stage.trainer or stage.callbacks or stage.optimizer or rounds > 1):
        raise ConfigurationError(
            f"`{where}` has `apply`, which does not train, beside keys of a fit; make them two stages"
        )
    if rounds == 1:
        return (stage,)
    numbers = range(1, rounds + 1)
    return tuple(replace(stage, name=f"{key}-{number}", round=number, rounds=rounds) for number in numbers)


def _references(where: str, names: Any, callbacks: Mapping[str, Any]) -> tuple[str, ...]:
    names = [] if names is None else names
    if not isinstance(names, list):
        raise ConfigurationError(f"`{where}` must be a list of names in `callbacks`, got {names!r}")
    for name in names:
        if name not in callbacks:
            raise ConfigurationError(
                f"`{where}` names {name!r}, which `callbacks` does not hold; {did_you_mean(str(name), callbacks)}"
            )
    return tuple(names)


def _baseline_after(value: Any, stages: Sequence[Stage]) -> str | None:
    """Return the name of the stage whose end is the baseline; of one with rounds, the first."""
    keys = list(dict.fromkeys(stage.key for stage in stages))
    if value is not None and value not in keys:
        raise ConfigurationError(f"`baseline_after` must be a stage, got {value!r}; {did_you_mean(str(value), keys)}")
    if not keys:
        return None
    key = next((key for key in keys if key in BASELINE_NAMES), keys[0]) if value is None else value
    return next(stage.name for stage in stages if stage.key == key)
