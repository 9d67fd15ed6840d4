"""The API page (launch/docs.py), of a few modules; the command builds all of them, in half a minute.

Not covered: what a page looks like.
"""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

pytest.importorskip("pdoc")

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs_page", REPO / "launch" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_built_without_a_warning_and_show_docstrings_as_they_are(docs, tmp_path):
    names = [*docs.modules("glmv_jax.losses"), *docs.modules("glmv_jax.config")]
    assert {"glmv_jax.losses.policy.surrogates", "glmv_jax.config"} < set(names), "also what no __all__ names"
    assert docs.build(names, tmp_path) == []
    page = (tmp_path / "glmv_jax/losses/policy.html").read_text()
    assert "\n    dr_grpo      R - mean  " in page, "columns stay columns"
    assert '<code><a href="#informative">informative</a></code>' in page, "a name in backticks leads to what it names"
    assert {name.replace(".", "/") + ".html" for name in names} <= {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")
    }


def test_what_cannot_be_resolved_is_told(docs, tmp_path, monkeypatch):
    source = "from __future__ import annotations\ndef f(x: Nowhere) -> int:\n    'Is.'\n"
    (tmp_path / "lost_words.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = docs.build(["lost_words"], tmp_path / "pages")
    assert "Nowhere" in line and "lost_words.f" in line
