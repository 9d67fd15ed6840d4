"""The design, held by reading the source: who may import whom, and what may lie where.

The checks are functions of a folder, so that the same file can show each of them failing on a small wrong tree.
Imports by string (importlib) are not seen.
"""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from glmv_jax import config
from glmv_jax.typing import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPO / "glmv_jax"

_BASE = {"typing", "config", "presets"}
_COMPUTE = _BASE | {"trees", "parallel", "kernels", "models"}

# part of glmv_jax -> the other parts it may import
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "typing": set(),
    "config": {"typing", "presets"},
    "presets": {"typing"},  # sizes by name
    "trees": {"typing"},  # of arrays, by slash paths
    "parallel": _BASE | {"trees"},
    "kernels": _BASE | {"parallel"},
    "models": _BASE | {"parallel", "kernels"},
    "inference": _COMPUTE | {"data"},  # a prompt is text and pictures: `generate` builds it as training did
    "losses": _BASE | {"parallel"},
    "optim": _BASE | {"trees", "parallel"},
    "data": _BASE,
    "agents": _BASE,
    "interop": _COMPUTE,
    "rl": _BASE | {"losses", "inference", "agents", "data"},
    "eval": _COMPUTE | {"inference", "agents", "data"},
    "serving": _BASE | {"inference", "data"},  # is handed an engine; what it serves, `cli` loads
    "train": _COMPUTE | {"inference", "losses", "optim", "data", "agents", "interop", "rl", "eval"},
    "doctor": _BASE | {"data"},
}
MAY_IMPORT["aot"] = MAY_IMPORT["train"] | {"train"}  # compiles the very step that training runs
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"cli"}

# library -> the only parts that may import it ([] is nowhere). Objects are pickled for the pipe to a worker that grades
# alone: what devices and the processes of a run tell each other are arrays, as JAX's collectives take nothing else.
LIBRARIES = {"flax": ["models"], "torch": [], "transformers": [], "tensorflow": [], "torchvision": [],
             "sklearn": [], "starlette": ["serving"], "uvicorn": ["serving"], "pickle": ["rl"],
             "cloudpickle": [], "mpi4py": []}  # fmt: skip
# part -> libraries it must do without
WITHOUT = {"data": ["jax", "optax", "orbax", "chex"], "agents": ["jax", "numpy", "optax"], "losses": ["flax", "optax"],
           "serving": ["jax"]}  # fmt: skip
EXPERIMENTS_MAY_IMPORT = ("__future__", "ml_collections", "glmv_jax.config")

TOP_LEVEL = {"glmv_jax", "experiments", "launch", "tests", "benchmarks", "pyproject.toml", "README.md", "LICENSE"}
NOT_COMMITTED = re.compile(r"runs|build|dist|.*\.egg-info|__pycache__")


# --- reading ----------------------------------------------------------------------------------------------------------


def imports(path: pathlib.Path, module: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions too; relative ones made absolute.

    `from a import b` counts as `a.b`, as b may be a module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return [(node.lineno, name) for node in ast.walk(tree) for name in names(node, path, module)]


def names(node: ast.AST, path: pathlib.Path, module: str) -> list[str]:
    """The dotted modules of an import statement of the file; none of any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{source}.{alias.name}" for alias in node.names]


def part_of(module: str) -> str:
    """glmv_jax.data.corpus -> data; glmv_jax -> __init__."""
    return (module.split(".") + ["__init__"])[1]


def broken_imports(package: pathlib.Path) -> list[str]:
    """Every import in the package that the design does not allow, as file:line: reason."""
    parts = {
        path.stem if path.suffix == ".py" else path.name for path in package.iterdir() if path.name != "__pycache__"
    }
    wrong = [f"{part}: not a part of the design" for part in sorted(parts - set(MAY_IMPORT))]
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package.parent).with_suffix("")
        module = ".".join(relative.parts[:-1] if path.name == "__init__.py" else relative.parts)
        here = part_of(module)
        for line, name in imports(path, module):
            top = name.split(".")[0]
            place = f"{relative}.py:{line}:"
            if top == "glmv_jax":
                there = part_of(name)
                if there not in MAY_IMPORT:
                    continue  # a name of glmv_jax itself, such as __version__
                if there != here and there not in MAY_IMPORT.get(here, set()):
                    wrong.append(f"{place} {here} may not import {there}")
            elif top in LIBRARIES and here not in LIBRARIES[top]:
                wrong.append(f"{place} {top} is imported only in {LIBRARIES[top] or 'tests'}")
            elif top in WITHOUT.get(here, ()):
                wrong.append(f"{place} {here} does without {top}")
    return wrong


def at_import(path: pathlib.Path, module: str) -> set[str]:
    """The modules that importing a file imports: not those in functions, nor under TYPE_CHECKING."""
    found, todo = set(), list(ast.parse(path.read_text(encoding="utf-8"), str(path)).body)
    while todo:
        node = todo.pop()
        found.update(names(node, path, module))
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if not later and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    return found


def reached(package: pathlib.Path, start: str) -> dict[str, str]:
    """Every module that importing `start` and all below it imports -> the module that asks for it."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    todo = [(name, "") for name in files if name == start or name.startswith(f"{start}.")]
    found: dict[str, str] = {}
    while todo:
        module, by = todo.pop()
        if module in found:
            continue
        parent = module.rpartition(".")[0]
        if module in files:
            todo += [(name, module) for name in at_import(files[module], module)]
            todo += [(parent, module)] * bool(parent)
        elif parent in files:  # a name inside a module
            todo.append((parent, by))
            continue
        found[module] = by
    return found


def reaching(package: pathlib.Path, start: str, barred: set[str], allowed: set[str] = frozenset()) -> list[str]:
    """What importing `start` imports of the barred modules, with the module that asks for each."""
    return sorted(
        f"{by} imports {module}"
        for module, by in reached(package, start).items()
        if module not in allowed and any(module == name or module.startswith(f"{name}.") for name in barred)
    )


def broken_experiments(folder: pathlib.Path) -> list[str]:
    wrong = []
    for path in sorted(folder.glob("*.py")):
        for line, name in imports(path, f"experiments.{path.stem}"):
            if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in EXPERIMENTS_MAY_IMPORT):
                wrong.append(f"{path.name}:{line}: experiments import ml_collections and glmv_jax.config, not {name}")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            wrong.append(f"{path.name}: no docstring with command, hardware and expected numbers")
    return wrong


def broken_layout(repo: pathlib.Path) -> list[str]:
    names = {path.name for path in repo.iterdir() if not path.name.startswith(".")}
    return [
        f"{name}: does not belong at the top" for name in sorted(names - TOP_LEVEL) if not NOT_COMMITTED.fullmatch(name)
    ]


def broken_style(folder: pathlib.Path) -> list[str]:
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{path.name}: no docstring")
        for node in ast.walk(tree):
            silent = isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            if silent and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")):
                wrong.append(f"{path.name}:{node.lineno}: an exception is swallowed")
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"#\s*(TODO|FIXME|XXX)\b", text):
                wrong.append(f"{path.name}:{line}: {text.strip()}")
    return wrong


# --- the project ------------------------------------------------------------------------------------------------------


def test_imports():
    assert broken_imports(PACKAGE) == []


# What the extras bring, and jax with those that bring it.
EXTRAS = {"httpx", "math_verify", "sympy", "gymnasium", "reasoning_gym", "miniwob", "selenium", "starlette", "uvicorn",
          "mcp", "ray"}  # fmt: skip
TRAINERS = {"jax", "flax", "optax", "orbax", "grain", "chex", "glmv_jax.train", "glmv_jax.models", "glmv_jax.inference"}


def test_the_trainer_is_imported_without_the_reward_package_and_without_extras():
    """But for the record of a verdict, which both sides know, and which needs nothing."""
    record = {"glmv_jax.rl.rewards", "glmv_jax.rl.rewards.grade", "glmv_jax.rl.rewards.runner"}
    assert reaching(PACKAGE, "glmv_jax.train", {"glmv_jax.rl.rewards", "glmv_jax.rl.tasks"} | EXTRAS, record) == []
    assert "glmv_jax.rl.batch" in reached(PACKAGE, "glmv_jax.train")


def test_graders_are_imported_without_a_trainer():
    assert reaching(PACKAGE, "glmv_jax.rl.rewards", TRAINERS | EXTRAS) == []
    assert reaching(PACKAGE, "glmv_jax.rl.tasks", TRAINERS | EXTRAS) == []
    assert "glmv_jax.data.records" in reached(PACKAGE, "glmv_jax.rl.rewards")


def test_experiments_import_configs_only():
    assert broken_experiments(REPO / "experiments") == []


def test_top_level():
    assert broken_layout(REPO) == []


@pytest.mark.parametrize("folder", ["glmv_jax", "experiments", "benchmarks", "tests"])
def test_style(folder):
    assert broken_style(REPO / folder) == []


@pytest.mark.parametrize("path", sorted((REPO / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_every_experiment_loads_at_nano_and_is_strict(path):
    cfg = config.load(f"{path}:size=nano")
    flat = config.flat(config.freeze(cfg))
    assert flat["stage"] in ("mim", "siglip", "pretrain", "sft", "rl") and "seed" in flat
    assert config.flat(config.unflat(flat)) == flat
    with pytest.raises(UserError, match="nearest: size"):
        config.load(f"{path}:sise=nano")
    with pytest.raises(UserError, match="nearest: seed"):
        config.override(cfg, ["sed=1"])


def test_import_is_lazy_and_public_names_resolve():
    code = """
import sys, glmv_jax
heavy = {"jax", "numpy", "flax", "ml_collections", "glmv_jax.models", "glmv_jax.train"} & set(sys.modules)
assert not heavy, heavy
for name in glmv_jax.__all__:
    assert getattr(glmv_jax, name) is not None and name in dir(glmv_jax)
assert glmv_jax.models.__name__ == "glmv_jax.models"
try:
    glmv_jax.modles
except AttributeError as error:
    assert "modles" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


# --- each rule fails on a wrong tree ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("models/a.py", "from glmv_jax.train import loop", "models may not import train"),
        ("models/a.py", "from ..losses import siglip", "models may not import losses"),
        ("losses/a.py", "from glmv_jax import models", "losses may not import models"),
        ("losses/a.py", "import glmv_jax.data.records", "losses may not import data"),
        ("rl/tasks/a.py", "def f():\n    from glmv_jax.train.state import State", "rl may not import train"),
        ("eval/a.py", "from glmv_jax.rl import task", "eval may not import rl"),
        ("parallel/a.py", "from glmv_jax.kernels import attention", "parallel may not import kernels"),
        ("losses/a.py", "import flax.linen as nn", "flax is imported only in"),
        ("data/a.py", "import jax.numpy as jnp", "data does without jax"),
        ("agents/a.py", "from jax import numpy", "agents does without jax"),
        ("interop/a.py", "import torch", "torch is imported only in tests"),
        ("train/a.py", "import pickle", "pickle is imported only in ['rl']"),
        ("inference/a.py", "if 1:\n    from transformers import AutoModel", "transformers is imported only in tests"),
        ("helpers/a.py", "", "not a part of the design"),
        ("config.py", "from glmv_jax import models", "config may not import models"),
    ],
)
def test_wrong_import_is_seen(tmp_path, file, line, complaint):
    path = tmp_path / "glmv_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(wrong := broken_imports(tmp_path / "glmv_jax")) == 1 and complaint in wrong[0]


def test_right_imports_are_let_through(tmp_path):
    path = tmp_path / "glmv_jax" / "models" / "deep" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("import flax\nfrom . import b\nfrom ..block import x\nfrom glmv_jax import __version__\nimport jax")
    assert broken_imports(tmp_path / "glmv_jax") == []


def test_what_an_import_reaches_is_seen(tmp_path):
    package = tmp_path / "glmv_jax"
    (package / "rl").mkdir(parents=True)
    for name, text in {
        "__init__": "", "rl/__init__": "from . import a", "rl/a": "import httpx.core\ndef f():\n    import sympy",
        "train": "from typing import TYPE_CHECKING\ntry:\n    from glmv_jax.rl import b\nexcept E:\n    import ray\n"
                 "if TYPE_CHECKING:\n    import mcp",
        "rl/b": "class A:\n    from glmv_jax.rl.b import name",
    }.items():  # fmt: skip
        (package / f"{name}.py").write_text(text)
    assert reaching(package, "glmv_jax.train", {"httpx", "sympy", "ray", "mcp", "glmv_jax.rl"}, {"glmv_jax.rl"}) == [
        "glmv_jax.rl imports glmv_jax.rl.a", "glmv_jax.rl.a imports httpx.core", "glmv_jax.train imports glmv_jax.rl.b",
        "glmv_jax.train imports ray",
    ]  # fmt: skip


def test_wrong_experiment_layout_and_style_are_seen(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('"""Doc."""\nfrom glmv_jax import models, config')
    assert broken_experiments(tmp_path) == [
        "x.py:2: experiments import ml_collections and glmv_jax.config, not glmv_jax.models"
    ]
    path.write_text("x = 1  # " + "TODO later\ntry:\n    x\nexcept Exception:\n    pass\n")
    assert [line.partition(": ")[2].split()[0] for line in broken_style(tmp_path)] == ["no", "an", "x"]
    assert "no docstring" in broken_experiments(tmp_path)[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / ".venv").mkdir()
    assert broken_layout(tmp_path) == ["x.py: does not belong at the top"]
