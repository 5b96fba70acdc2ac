"""Build sdist and wheel, install the wheel in an empty environment, and use it from an empty folder.

Checks that both archives carry the configuration and the recipes, that the installed command finds them, that a
run ends in a report and an artifact of the size it states, and that a Hydra app of somebody else sees the groups.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOREIGN_CONFIG = "epochs: 3\ncallbacks: {}\n"
FOREIGN_APP = """
import hydra
from hydra.utils import instantiate
from lightning_compress import IterativePruning


@hydra.main(version_base="1.3", config_path="settings", config_name="app")
def main(cfg):
    callbacks = instantiate(cfg.callbacks)
    assert list(callbacks) == ["prune"], callbacks
    assert isinstance(callbacks["prune"], IterativePruning)
    print("foreign app: ok")


main()
"""


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command, show what it prints, stop on failure; return what it printed."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    print("$", *command, flush=True)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Return the sdist and the wheel, the wheel built from the unpacked sdist, as an installer would."""
    call(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def check_contents(wheel: Path) -> None:
    """Every configuration file and recipe of the checkout is in the wheel, and nothing of the tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("conf", "recipes"):
        for path in (ROOT / kind).rglob("*.yaml"):
            wanted = f"lightning_compress/{path.relative_to(ROOT).as_posix()}"
            if wanted not in names:
                sys.exit(f"{wheel.name} lacks {wanted}")
    stray = sorted(name for name in names if not name.startswith(("lightning_compress", "hydra_plugins/")))
    if stray:
        sys.exit(f"{wheel.name} carries files outside its packages: {stray[:5]}")
    print(f"{wheel.name}: {len(names)} files, configuration and recipes complete")


def check_run(folder: Path) -> None:
    """The run left a report and an artifact whose size is the one stated."""
    (report,) = folder.rglob("report.json")
    content = json.loads(report.read_text(encoding="utf-8"))
    size = (report.parent / "compressed.safetensors").stat().st_size
    stated = content["compressed"]["artifact_bytes"]
    if size != stated:
        sys.exit(f"the artifact has {size} bytes, the report states {stated}")
    for name in ("report.md", "report.html", "config.yaml"):
        if not (report.parent / name).is_file():
            sys.exit(f"the run left no {name}")
    print(f"installed command: ok, compression rate {content['compression_rate']:.2f}")


def main() -> None:
    """Run all checks in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter that makes the empty environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel check ") as name:
        folder = Path(name)
        _, wheel = build(folder)
        check_contents(wheel)
        call(arguments.python, "-m", "venv", folder / "venv", cwd=folder)
        binary = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        call(binary / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder)

        empty = folder / "empty"
        empty.mkdir()
        call(binary / "lightning-compress", "recipes=digits_prune", cwd=empty)
        check_run(empty)

        foreign = folder / "foreign"
        (foreign / "settings").mkdir(parents=True)
        (foreign / "settings" / "app.yaml").write_text(FOREIGN_CONFIG, encoding="utf-8")
        (foreign / "app.py").write_text(FOREIGN_APP, encoding="utf-8")
        call(binary / "python", "app.py", "+callbacks/compress=[prune]", cwd=foreign)
    print("wheel check: ok")


if __name__ == "__main__":
    main()
