"""The layer table: imports go down only, siblings never import each other; and how much code a reader has to open."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "neox"
LAYERS = (
    ("config",),
    ("system",),
    ("tokenizer", "model"),
    ("data", "parallel", "quantization", "adapters", "checkpoint"),
    ("corpus",),
    ("train", "generate"),
    ("tune", "evaluation", "analysis", "planning", "serve", "quickstart"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""Modules of each layer, lowest first: a module imports from lower layers only."""
NEVER_TORCH = ("config", "model/flops.py", "model/mup.py", "model/training_memory.py")
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}


def imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Dotted names that the code imports, at any depth; names of attributes included, `torch.distributed` too."""
    found = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}") if node.value.id == "torch" else None
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """What is wrong with a package, given as {path below neox/: source}."""
    wrong = []
    for path, source in sources.items():
        parts = path.removesuffix(".py").split("/")
        is_package = parts[-1] == "__init__" and len(parts) > 1
        top = parts[0]
        module = ".".join(["neox", *(parts[:-1] if parts[-1] == "__init__" else parts)])
        if top not in LAYER:
            wrong.append(f"{path}: {top} is not in the layer table")
            continue
        for name in imports(ast.parse(source), module, is_package or path == "__init__.py"):
            first, _, rest = name.partition(".")
            if first == "torch" and path.startswith(NEVER_TORCH):
                wrong.append(f"{path}: imports torch")
            if name.startswith("torch.distributed") and top in ("model", "data"):
                wrong.append(f"{path}: imports torch.distributed")
            if first != "neox":
                continue
            target = rest.partition(".")[0]
            if target not in LAYER:
                target = "__init__"  # a public name, or the package itself
            if target != top and LAYER[target] >= LAYER[top]:
                wrong.append(f"{path}: {top} imports {target}")
    return wrong


def test_the_package_holds_the_layer_table():
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {"config/presets.py", "model/decoder.py", "cli/__init__.py", "__init__.py"} <= set(sources)
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/config.py", "import torch"),
        ("config/options.py", "def late():\n    from torch import nn"),
        ("config/presets.py", "from neox.system.files import write_atomic"),
        ("config/presets.py", "from ..system import files"),
        ("system/files.py", "from neox.model.decoder import GPTNeoX"),
        ("model/flops.py", "import torch"),
        ("model/decoder.py", "import torch.distributed as dist"),
        ("model/decoder.py", "from torch import distributed"),
        ("model/decoder.py", "import torch\n\ndef late():\n    return torch.distributed.get_rank()"),
        ("model/cache.py", "from neox.tokenizer import Tokenizer"),
        ("data/loader.py", "from torch.distributed import get_rank"),
        ("data/loader.py", "from neox.checkpoint import load"),
        ("data/loader.py", "from ..parallel import mesh"),
        ("data/loader.py", "from neox.corpus import prepare"),
        ("checkpoint/legacy.py", "from neox import parallel"),
        ("corpus/worker.py", "from neox.train import Trainer"),
        ("train/trainer.py", "def late():\n    from neox.generate import Engine"),
        ("train/trainer.py", "from neox.evaluation import evaluate"),
        ("train/__init__.py", "from .. import generate"),
        ("train/loss.py", "import importlib\nimportlib.import_module('neox.serve')"),
        ("generate/engine.py", "import neox"),
        ("generate/engine.py", "from neox import load"),
        ("planning/summary.py", "from neox.analysis import features"),
        ("serve/app.py", "from neox.cli import main"),
        ("surprise.py", ""),
    ],
)
def test_a_planted_violation_is_caught(path, source):
    assert len(violations({path: source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/config.py", "from neox.config import presets\nfrom neox.config.options import Section"),
        ("model/decoder.py", "import torch\nfrom neox.model.cache import KVCache"),
        (
            "parallel/mesh.py",
            "import torch.distributed\nfrom neox.system.processes import rank\nfrom .tp_plan import p",
        ),
        (
            "data/__init__.py",
            "from . import token_file\nfrom neox.data.loader import Loader\nfrom ..system.files import write_atomic",
        ),
        ("train/trainer.py", "from neox.checkpoint import save\nfrom neox.train.loss import loss\nfrom . import loss"),
        ("cli/show.py", "import neox\nfrom neox import planning\nfrom neox.train import Trainer"),
        ("quickstart/run.py", "from neox.generate import Engine\nfrom neox.train import Trainer"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations({path: source}) == []


# --- measures --------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Files of the package by their dotted names."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def always_imported(tree: ast.AST) -> list[str]:
    """Dotted names that a module imports when it is imported itself: not in a function, not for type checking."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            names += [name for branch in node.orelse for name in always_imported(ast.Module([branch], []))]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names += always_imported(node)
    return names


def lazy_names(tree: ast.AST) -> dict[str, str]:
    """A package's table of names that it resolves on first use: an import of one imports its module after all."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    return {}


def reached(start: str) -> list[Path]:
    """Files that an import of `start` reads, the packages on the way included."""
    files, seen, waiting = modules(), set(), [start]
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in always_imported(trees[module]):
            package, _, attribute = name.rpartition(".")
            if package in trees and attribute in (lazy := lazy_names(trees[package])):
                waiting.append(lazy[attribute])
            while name:
                if name in trees:
                    waiting.append(name)
                name = name.rpartition(".")[0]
    return sorted(files[module] for module in seen)


def lines(files) -> int:
    return sum(len(path.read_text().splitlines()) for path in files)


def test_what_the_trainer_imports_can_be_read():
    files = reached("neox.train.trainer")
    listed = "\n".join(f"{lines([path]):5} {path.relative_to(PACKAGE)}" for path in files)
    said = f"neox.train.trainer reaches {len(files)} files, {lines(files)} lines:\n{listed}"
    assert len(files) <= 60, said
    assert lines(files) <= 9_500, said
    assert PACKAGE / "data" / "loader.py" in files, "imported by a name that neox.data resolves lazily"


def test_the_spine_is_read_in_an_afternoon():
    """Config with its sections and parsing, presets, decoder, cache, TP plan, trainer, engine."""
    names = ("config/config.py", "config/options.py", "config/presets.py", "model/decoder.py")
    names += ("model/cache.py", "parallel/tp_plan.py", "train/trainer.py", "generate/engine.py")
    files = [*(PACKAGE / name for name in names), *sorted((PACKAGE / "config" / "sections").glob("*.py"))]
    listed = "\n".join(f"{lines([path]):5} {path.relative_to(PACKAGE)}" for path in files)
    assert lines(files) <= 2_500, f"{lines(files)} lines:\n{listed}"


def test_a_file_name_stands_for_one_file():
    counts = Counter(path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_root_holds_rooms_and_the_tokenizer():
    python = ("__init__.py", "__main__.py", "__pycache__", "py.typed")  # what Python and its tools want there
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name not in python)
    assert len(entries) <= 16, entries


def test_docstrings_begin_with_a_verb_or_a_noun():
    """At most 2 % begin with a noun clause or a fragment, by which no reader searches."""
    first = [
        (path.relative_to(PACKAGE), docstring.partition("\n")[0])
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if (docstring := ast.get_docstring(node))
    ]
    starts = ("What ", "Which ", "Whether ", "Of ", "Those ", "How many ")
    bad = [(path, line) for path, line in first if line.startswith(starts)]
    assert len(bad) < 0.02 * len(first), bad
