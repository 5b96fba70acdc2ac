"""The command: ``lightning-compress [recipes=NAME] [group=choice] [key=value ...]``, a Hydra app with short errors."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_compress import __version__
from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.run.explain import explain
from lightning_compress.run.help import help_text
from lightning_compress.run.overrides import check_overrides
from lightning_compress.run.shipped import config_folder, register_recipes
from lightning_compress.run.tasks import resume_run, run_settings

TRACEBACK = "LIGHTNING_COMPRESS_TRACEBACK"
BAD_INPUT = 2
INTERRUPTED = 130

HYDRA_VARIABLE = "HYDRA_FULL_ERROR"

log = logging.getLogger(__name__)

FLAGS = (
    *("--help", "-h", "--version", "--multirun", "-m", "--run", "-r", "--cfg", "-c", "--resolve", "--package", "-p"),
    *("--info", "-i", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--hydra-help"),
    *("--shell-completion", "-sc"),
)


@dataclass(frozen=True)
class _Failure:
    error: Exception
    job: str | None
    """The overrides of a job in a sweep; ``None`` for a single run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 after one line on stderr that says what was wrong.

    Args:
        arguments: The words after the command's name; ``None`` takes those of the process.

    Raises:
        Exception: Whatever went wrong, if ``LIGHTNING_COMPRESS_TRACEBACK=1`` or ``HYDRA_FULL_ERROR=1``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = any(os.environ.get(name) == "1" for name in (TRACEBACK, HYDRA_VARIABLE))
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # Lightning leaves this way when it is interrupted
        if isinstance(stop.__context__, KeyboardInterrupt):
            return INTERRUPTED
        raise
    except Exception as error:
        if wants_traceback:
            raise
        print(f"lightning-compress: error: {explain(error, words)}", file=sys.stderr)
        return BAD_INPUT


def _dispatch(words: list[str]) -> int:
    _check_flags(words)
    if "--help" in words or "-h" in words:
        print(help_text())
        return 0
    if "--version" in words:
        print(f"lightning-compress {__version__}")
        return 0
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `model.module._target_=my.Module` means a file beside the user
    resumed = [word for word in words if word.startswith("resume=")]
    if resumed:
        if len(words) > 1:
            raise ConfigurationError("`resume` continues a run as it was configured and takes no other argument")
        resume_run(Path(resumed[0].removeprefix("resume=")))
        return 0
    return _run_hydra(words)


def _check_flags(words: list[str]) -> None:
    """Refuse a mistyped flag before Hydra's parser prints its whole usage."""
    for word in words:
        flag = word.split("=", 1)[0]
        if flag.startswith("-") and flag not in FLAGS:
            raise ConfigurationError(f"`{flag}` is not a flag of this command; {did_you_mean(flag, FLAGS)}")


def _run_hydra(words: list[str]) -> int:
    """Let Hydra compose and launch; keep a failing job's error out of its hands, so that it is printed once."""
    failures: list[_Failure] = []
    register_recipes()
    app = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_job(failures))
    with _process_state(words):
        app()
    for failure in failures:
        if failure.job is None:
            raise failure.error
    return BAD_INPUT if failures else 0


@contextmanager
def _process_state(words: list[str]) -> Iterator[None]:
    """Hand Hydra its arguments, and make it raise its own errors instead of printing them and leaving."""
    arguments, variable = sys.argv, os.environ.get(HYDRA_VARIABLE)
    sys.argv = ["lightning-compress", *words]
    os.environ[HYDRA_VARIABLE] = "1"
    try:
        yield
    finally:
        sys.argv = arguments
        os.environ.pop(HYDRA_VARIABLE)
        if variable is not None:
            os.environ[HYDRA_VARIABLE] = variable


def _job(failures: list[_Failure]) -> Callable[[DictConfig], None]:
    def job(config: DictConfig) -> None:
        settings = HydraConfig.get()
        try:
            words = cast(list[str], OmegaConf.to_container(settings.overrides.task, resolve=False))
            check_overrides(config, words)
            run_settings(config, Path(settings.runtime.output_dir))
        except Exception as error:
            log.debug("the run failed", exc_info=True)
            name = " ".join(settings.overrides.task) if settings.mode == RunMode.MULTIRUN else None
            failures.append(_Failure(error, name))
            if name is not None:  # the other jobs of a sweep go on
                print(f"lightning-compress: error in job `{name}`: {explain(error, ())}", file=sys.stderr)

    return job


if __name__ == "__main__":
    sys.exit(main())
