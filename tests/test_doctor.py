"""What `glmv doctor` finds, compared with other ways to learn the same, and with a damaged corpus."""

from __future__ import annotations

import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tomllib

import pytest

from glmv_jax import doctor

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_machine_agrees_with_other_sources():
    found = {finding.subject: finding for finding in doctor.machine()}
    assert found["python"].text.startswith(".".join(map(str, sys.version_info[:3])))
    cores = int(
        subprocess.run(["nproc"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True).stdout
    )
    assert found["cores"].text.startswith(f"{cores} of ")
    total, free = doctor.memory_bytes()
    assert 0 < free <= total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_requirements_are_those_of_pyproject():
    required = doctor.requirements()
    if not required:
        pytest.skip("glmv_jax is imported from a folder, not installed")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    tables = {"": project["dependencies"], **project["optional-dependencies"]}
    assert set(required) == set(tables)
    for extra, lines in tables.items():
        if extra not in ("cuda", "tpu"):
            assert sorted(required[extra]) == sorted(re.match(r"[\w.-]+", line).group() for line in lines)
    assert required["cuda"] == ["jax-cuda12-plugin"] and required["tpu"] == ["libtpu"]


def test_extra_that_is_missing_names_its_command():
    assert doctor.install_command("hf").endswith(f"-m pip install -e '{REPO}[hf]'")
    for finding in doctor.extras():
        assert finding.state == "ok" or finding.subject.removeprefix("extra ") in finding.text


def test_devices_are_the_emulated_ones():
    (finding,) = [finding for finding in doctor.devices() if finding.subject == "devices"]
    assert finding.state == "ok" and finding.text.startswith("8 x cpu")


def test_corpus_is_readable_and_damage_is_found(tmp_path, monkeypatch):
    from glmv_jax.data import corpus

    assert [finding for finding in doctor.corpus_files() if finding.state != "ok"] == []

    copy = tmp_path / "corpus"
    shutil.copytree(corpus.FOLDER, copy)
    monkeypatch.setattr(corpus, "FOLDER", copy)
    (copy / "emoji-0.webp").write_bytes((copy / "emoji-0.webp").read_bytes()[:1000])
    (copy / "vocab.model").write_bytes(b"not a model")
    (copy / "emoji.tsv").unlink()
    (copy / "fonts.json").write_text("{")
    broken = {finding.text.split()[0] for finding in doctor.corpus_files() if finding.state == "broken"}
    assert broken == {"emoji-0.webp", "vocab.model", "emoji.tsv", "fonts.json"}


def test_verdict_and_exit_code(capsys):
    ok, low, broken = (doctor.Finding(state, "disk", "words") for state in ("ok", "low", "broken"))
    assert doctor.main([lambda: [ok], lambda: [low]]) == 0
    assert "disk         low: words\n\nready: bash launch/quickstart.sh" in capsys.readouterr().out
    assert doctor.main([lambda: [ok], lambda: [broken]]) == 1
    assert "broken: words\n\n1 broken; see above" in capsys.readouterr().out
    shown = doctor.main()
    assert shown == ("broken: " in capsys.readouterr().out)
