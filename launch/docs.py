"""The API page: all of glmv_jax from its docstrings, as they are written, by pdoc (of the extra `dev`).

    python launch/docs.py [folder] [module ...]        (default: build/docs glmv_jax)

Whatever pdoc warns of, a module that cannot be imported or a name that is nowhere, is an error: a line each, and exit
code 1. Docstrings here are plain text in columns, so they are set as such and not read as Markdown; names in backticks
lead to what they name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
import pathlib
import pydoc
import re
import sys
import types
import typing
import warnings
from collections.abc import Sequence

os.environ.setdefault("PDOC_DISPLAY_ENV_VARS", "1")  # defaults are shown as they are in the source

import pdoc  # noqa: E402
from markupsafe import Markup, escape  # noqa: E402
from pdoc import render  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parent.parent
# 120 columns are as wide as pdoc's page.
_SET = '<div style="white-space: pre; overflow-x: auto; font: .74rem/1.5 ui-monospace, monospace">%s</div>'


def written(docstring: str) -> Markup:
    """A docstring as it stands in the source, as HTML; `names` become code, which pdoc makes links of."""
    return Markup(_SET % re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(docstring))))


def modules(name: str) -> list[str]:
    """A module, or a package and all modules in it; by their files, as pdoc passes over what no `__all__` names."""
    path = REPO.joinpath(*name.split("."))
    files = (file.relative_to(REPO).with_suffix("") for file in path.rglob("*.py")) if path.is_dir() else ()
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files if file.name != "__main__") or [name]


def build(names: Sequence[str], folder: pathlib.Path) -> list[str]:
    """Writes the pages of modules, an index and the data of a search; returns what pdoc warned of, a line each."""
    render.env.filters |= {"to_markdown": str, "to_html": written}
    render.configure(footer_text="glmv_jax", search=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in names:
            _made_plain(importlib.import_module(name))
        found = {name: pdoc.doc.Module.from_name(name) for name in names}
        pages = {f"{name.replace('.', '/')}.html": render.html_module(module, found) for name, module in found.items()}
        pages |= {"index.html": render.html_index(found), "search.js": render.search_index(found)}
    for name, page in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(page, encoding="utf-8")
    home = os.path.dirname(pdoc.__file__)
    told = [" ".join(str(one.message).split()) for one in said if one.filename.startswith(home)]
    return [line for line in dict.fromkeys(told) if _is_ours(line)]


def _made_plain(module: types.ModuleType) -> None:
    """What a module imports when it is first used is imported, and annotations of classes whose constructor is made for
    them are resolved, each in the module that it was written in."""
    for name in getattr(module, "__all__", ()):
        vars(module).setdefault(name, getattr(module, name))
    for kind in filter(inspect.isclass, list(vars(module).values())):
        maker = kind.__init__ if dataclasses.is_dataclass(kind) else kind.__new__
        made = dataclasses.is_dataclass(kind) or hasattr(kind, "_make")  # of NamedTuple
        if made and inspect.isfunction(maker) and kind.__module__ == module.__name__:
            maker.__module__ = kind.__module__
            with contextlib.suppress(NameError):  # of what is imported for type checkers alone; pdoc knows how
                maker.__annotations__ |= typing.get_type_hints(kind)


def _is_ours(line: str) -> bool:
    """Whether a warning is of something that is written here, and not of a function that a name here stands for."""
    found = re.search(r"for (glmv_jax[\w.]*)\. Import", line)
    at = pydoc.locate(found[1]) if found else None
    return str(getattr(at, "__module__", None) or "glmv_jax").startswith("glmv_jax")


def main(argv: Sequence[str]) -> int:
    sys.path.insert(0, str(REPO))  # this checkout's, whatever is installed
    folder = pathlib.Path(argv[0] if argv else "build/docs")
    told = build([name for package in argv[1:] or ["glmv_jax"] for name in modules(package)], folder)
    print(*told, sep="\n", file=sys.stderr, end="\n" if told else "")
    print(f"{len(list(folder.rglob('*.html')))} pages: {folder / 'index.html'}")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
