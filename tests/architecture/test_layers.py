"""The layer rule: a file imports its own sub-package and lower ranks; what must be quick to import brings no torch."""

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import moesaic

PACKAGE = Path(moesaic.__file__).parent

# Lowest first; what shares a line may not import one another.
LAYERS = (
    ("errors", "logs", "environment"),
    ("folders", "control_groups"),
    ("config",),
    ("kernels", "plan", "data", "report"),
    ("checkpoint",),
    ("moe",),
    ("model",),
    ("parallel",),
    ("evaluate",),
    ("train", "serve", "hf"),
    ("convert", "distill"),
    ("bench", "quickstart"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Packages that answer before torch could even be loaded.
WITHOUT_TORCH = ("config", "plan", "report")
# What `moesaic --help` must not wait for.
HEAVY = ("torch", "transformers", "datasets", "tokenizers", "matplotlib", "tensorboard", "safetensors", "pandas")

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import anywhere in a file, those in functions and for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # A bare `import moesaic` is judged by the names that are taken from it, below.
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name != "moesaic")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "moesaic":
            if not node.attr.startswith("__"):
                yield node.lineno, f"moesaic.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            # `from moesaic import config` and `from moesaic.config import model` may both name a module.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in (
            "import_module",
            "__import__",
        ):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)
            elif isinstance(target, ast.JoinedStr) and target.values and isinstance(target.values[0], ast.Constant):
                yield node.lineno, str(target.values[0].value)


def violations(source: str, path: str) -> list[str]:
    """Return the lines of a file (its path within the package) that break the layer rule."""
    own = path.split("/")[0].removesuffix(".py")
    package = ".".join(["moesaic", *path.split("/")[:-1]])
    found = []
    for line, module in imported_modules(ast.parse(source), package):
        root, *parts = module.split(".")
        if root != "moesaic" or parts == ["__version__"]:
            continue
        if not parts or parts[0] not in RANK:
            found.append(
                f"moesaic/{path}:{line} imports {module}, which is no layer; import the module that defines it"
            )
        elif parts[0] != own and RANK[parts[0]] >= RANK[own]:
            found.append(
                f"moesaic/{path}:{line} imports {module}: {own} (rank {RANK[own]}) may import ranks below its own, "
                f"{parts[0]} has rank {RANK[parts[0]]}; move what is shared down, or the caller up"
            )
    return found


# __init__ is the table of public names, which reaches everywhere, but lazily; __main__ starts the command line.
@pytest.mark.parametrize(
    "path", [path for path in FILES if name_of(path) not in ("__init__.py", "__main__.py")], ids=name_of
)
def test_a_file_imports_only_its_own_package_and_lower_ranks(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe/layer.py", "from moesaic.model.transformer import Transformer"),
        ("moe/layer.py", "import moesaic.train.loop"),
        ("moe/layer.py", "def f():\n    from moesaic.train import loop"),
        ("moe/layer.py", "if TYPE_CHECKING:\n    from moesaic.model import transformer"),
        ("moe/layer.py", "from ..model import transformer"),
        ("moe/layer.py", "from .. import train"),
        ("moe/layer.py", "import_module('moesaic.train.loop')"),
        ("moe/layer.py", "importlib.import_module(f'moesaic.train.{name}')"),
        ("moe/layer.py", "import moesaic\nmoesaic.train"),
        ("moe/layer.py", "import moesaic\nmoesaic.ModelConfig"),
        ("moe/layer.py", "from moesaic import train"),
        ("moe/layer.py", "from moesaic.cli.main import main"),
        ("data/shards.py", "from moesaic.report.records import read"),
        ("errors.py", "from moesaic.logs import logger"),
    ],
)
def test_the_checker_finds(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe/layer.py", "from moesaic.moe.router import Router"),
        ("moe/layer.py", "from . import router"),
        ("moe/layer.py", "from moesaic.kernels.reference import moe"),
        ("moe/layer.py", "import torch, moesaic.errors"),
        ("train/loop.py", "from moesaic import __version__"),
        ("train/loop.py", "import moesaic\nmoesaic.__file__"),
        ("cli/train.py", "def f():\n    from moesaic.train.loop import train"),
    ],
)
def test_the_checker_accepts(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_every_package_has_a_rank() -> None:
    names = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])} - {"__main__"}
    assert names <= set(RANK), "give the new package its place in LAYERS, and in docs/architecture.md"


def test_the_layers_are_written_down_as_they_are_checked() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.lstrip().startswith("errors logs "))
    written = [set(part.replace("|", " ").split()) for part in line.strip().split("<")]
    assert written == [set(names) for names in LAYERS]


def modules_of(*packages: str) -> list[str]:
    return [
        module.name
        for package in packages
        for module in pkgutil.walk_packages([str(PACKAGE / package)], prefix=f"moesaic.{package}.")
    ]


def loaded_by(modules: list[str], among: tuple[str, ...]) -> list[str]:
    """Return which of these top-level modules a fresh interpreter holds after importing the given ones."""
    code = f"import sys; [__import__(name) for name in {modules!r}]; print(*(set({among!r}) & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_config_plan_and_report_need_no_torch() -> None:
    assert loaded_by(modules_of(*WITHOUT_TORCH), ("torch",)) == []


def test_importing_moesaic_and_its_command_line_is_quick() -> None:
    verbs = [f"moesaic.cli.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE / "cli")])]
    assert loaded_by(["moesaic", "moesaic.cli.main", *verbs], HEAVY) == []


def test_the_allocator_is_there_before_torch() -> None:
    assert loaded_by(["moesaic.kernels.allocator", "moesaic.kernels.limits"], ("torch",)) == []


def test_completion_shows_the_public_names() -> None:
    assert dir(moesaic) == sorted(moesaic.__all__)


@pytest.mark.parametrize("name", moesaic.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(moesaic, name) is not None
    # Importing moesaic.train would replace a public name `train` by the package.
    assert name not in RANK


def test_an_unknown_public_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trainer'; it has .*\bTrainer\b"):
        moesaic.trainer  # noqa: B018


def undocumented(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not tree.body:
        return []
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if is_public and not ast.get_docstring(node):
            missing.append(node.name)
    return missing


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_and_public_names_say_what_they_are(path: Path) -> None:
    assert undocumented(path) == []


def test_every_verb_is_a_file_with_an_example() -> None:
    main = import_module("moesaic.cli.main")
    for verb in main.VERBS:
        documentation = getattr(import_module(f"moesaic.cli.{verb}"), verb).__doc__ or ""
        assert f"Example: moesaic {verb}" in documentation, verb


_MAKERS = ("empty", "zeros", "ones", "full", "rand", "randn")


@pytest.mark.parametrize("path", [each for each in FILES if each.is_relative_to(PACKAGE / "kernels")], ids=name_of)
def test_tensors_for_kernels_have_a_dtype_and_a_device(path: Path) -> None:
    """torch.set_default_dtype and set_default_device are their user's: what C++ fills with fp32 must have room for it,
    where C++ reaches it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=maker)) if maker in _MAKERS:
                lacking = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                assert not lacking, f"{name_of(path)}:{node.lineno} makes a tensor of torch's default {lacking}"


def test_environment_variables_are_in_the_guide() -> None:
    guide = (PACKAGE.parent / "docs/guides/commands.md").read_text(encoding="utf-8")
    read = re.compile(r'os\.environ(?:\.get\(|\[)"(\w+)"|^_?[A-Z_]+ = "(MOESAIC_\w+)"', re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in FILES]
    names = {"".join(each) for text in sources for each in read.findall(text)}
    assert {"MOESAIC_KERNELS", "MOESAIC_ALLOCATOR", "MOESAIC_API_KEYS", "CXX"} <= names
    known = {"PYTHONPATH", "LD_PRELOAD"}  # passed on, and looked at
    assert [name for name in sorted(names - known) if f"| `{name}`" not in guide and f", `{name}`" not in guide] == []
