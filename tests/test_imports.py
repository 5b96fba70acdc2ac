"""Who may import whom, which names stay unused, and that everything public is annotated and documented."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_compress

PACKAGE = Path(lightning_compress.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]

FAMILIES = ("pruning", "quantization", "low_rank", "layers", "distillation", "export")
MAY_USE = {"coding": {"coding"}, "core": {"core", "coding"}, "evaluation": {"evaluation", "core", "coding"}}
MAY_USE |= {family: {family, "core", "coding"} for family in FAMILIES}
MAY_USE["export"] |= {"quantization"}  # integer layers are what runtimes want

LIGHTNING_FILES = {
    "core/at_target.py",
    "core/averaging.py",
    "core/callback.py",
    "core/checks.py",
    "core/clock.py",
    "distillation/module.py",
    "distillation/moments.py",
    "distillation/own_metrics.py",
    "distillation/steps.py",
    "quantization/conversion.py",
    "evaluation/metrics.py",
    "stages.py",
}
LIGHTNING_FOLDERS = {"models", "data"}

FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def imported(name: str) -> Iterator[str]:
    """Yield every imported module, and ``module.name`` for what is taken from it."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def private(part: str) -> bool:
    return part.startswith("_") and not (part.startswith("__") and part.endswith("__"))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 40
    assert {"core/journal.py", "pruning/callbacks.py", "coding/bits.py"} <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[0] in MAY_USE])
def test_import_direction(name: str) -> None:
    folder = name.split("/")[0]
    for module in imported(name):
        parts = module.split(".")
        if parts[0] == "lightning_compress" and len(parts) > 1:
            special = (folder == "coding" and parts[1:3] == ["core", "errors"]) or (
                name == "core/checkpoint.py" and parts[1] == "__version__"
            )
            assert special or parts[1] in MAY_USE[folder], f"{name} imports {module}"


@pytest.mark.parametrize("name", NAMES)
def test_lightning_is_imported_where_allowed_only(name: str) -> None:
    uses = any(module.split(".")[0] in ("lightning", "pytorch_lightning") for module in imported(name))
    allowed = name in LIGHTNING_FILES or name.split("/")[0] in LIGHTNING_FOLDERS
    assert not uses or allowed or Path(name).name in ("callback.py", "callbacks.py"), name


@pytest.mark.parametrize("name", NAMES)
def test_no_private_names_and_nothing_that_runs_foreign_code(name: str) -> None:
    foreign = {"torch", "lightning", "lightning_fabric", "torchvision", "torchmetrics"}
    for module in imported(name):
        parts = module.split(".")
        assert parts[0] not in FORBIDDEN_MODULES, f"{name} imports {module}"
        if parts[0] in foreign:
            assert not any(private(part) for part in parts), f"{name}: {module}"
            assert parts[:2] != ["torch", "ao"], f"{name}: {module}"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute):
            parts = dotted(node).split(".")
            if parts[0] in (*foreign, "nn", "F"):
                assert not any(private(part) for part in parts), f"{name}: {parts}"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in FORBIDDEN_CALLS, f"{name}:{node.lineno} calls {called}"
            if called == "torch.load":
                safe = {keyword.arg: keyword.value for keyword in node.keywords}.get("weights_only")
                assert isinstance(safe, ast.Constant), f"{name}:{node.lineno} loads without weights_only=True"
                assert safe.value is True, f"{name}:{node.lineno} loads without weights_only=True"


def public(name: str) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef, bool]]:
    """Yield public functions, classes and methods of a file, and whether they belong to a class."""
    for node in tree(name).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    special = item.name.startswith("_") if isinstance(item, ast.FunctionDef) else True
                    if isinstance(item, ast.FunctionDef) and (not special or item.name == "__init__"):
                        yield f"{node.name}.{item.name}", item, True


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented_and_annotated(name: str) -> None:
    if not name.endswith("__main__.py"):
        assert ast.get_docstring(tree(name)), f"{name} has no docstring"
    for label, node, method in public(name):
        if not label.endswith("__init__"):
            assert ast.get_docstring(node), f"{name}: {label} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{name}: {label} has no return annotation"
            static = any(dotted(decorator) == "staticmethod" for decorator in node.decorator_list)
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs][int(method and not static) :]
            lacking = [argument.arg for argument in given if argument.annotation is None]
            assert not lacking, f"{name}: {label} has no annotation for {lacking}"


@pytest.mark.parametrize("name", lightning_compress.__all__)
def test_exported_names_exist_with_a_docstring(name: str) -> None:
    documented = inspect.getdoc(getattr(lightning_compress, name))
    assert documented
    assert len(documented.splitlines()[0]) > 10


def test_exports_are_sorted_and_complete() -> None:
    assert lightning_compress.__all__ == sorted(lightning_compress.__all__)
    body = tree("__init__.py").body
    taken = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert taken - {"annotations"} == set(lightning_compress.__all__)
