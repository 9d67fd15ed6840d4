"""`glmv doctor`: what this machine has, what is missing, and the command that installs it.

Every check yields lines of (state, subject, finding); "broken" means that glmv_jax cannot work until it is mended and
turns the exit code to 1, "missing" is something optional.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from glmv_jax import __version__

_GIB = 1 << 30
_NEEDED_MEMORY_GIB, _NEEDED_DISK_GIB = 6, 2  # what the quickstart takes


class Finding(NamedTuple):
    """One line: state is "ok", "missing", "low" or "broken"."""

    state: str
    subject: str
    text: str


def main(checks: Sequence[Callable[[], Iterable[Finding]]] = ()) -> int:
    """Prints every finding (of all checks when none are given); returns 1 when something required is broken, else 0."""
    broken = 0
    for check in checks or (machine, packages, devices, extras, corpus_files):
        for finding in check():
            mark = "" if finding.state == "ok" else f"{finding.state}: "
            print(f"{finding.subject:<12} {mark}{finding.text}")
            broken += finding.state == "broken"
    print(f"\n{broken} broken; see above" if broken else "\nready: bash launch/quickstart.sh runs the whole recipe")
    return 1 if broken else 0


# --- the machine ------------------------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    """Python, cores, memory and disk."""
    version = platform.python_version()
    yield Finding("ok", "python", f"{version} at {sys.executable}")
    yield Finding("ok", "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} ({platform.machine()})")

    total, free = memory_bytes()
    enough = free >= _NEEDED_MEMORY_GIB * _GIB
    wish = "" if enough else f"; the quickstart takes up to {_NEEDED_MEMORY_GIB} GiB"
    yield Finding("ok" if enough else "low", "memory", f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free{wish}")

    free = shutil.disk_usage(".").free
    enough = free >= _NEEDED_DISK_GIB * _GIB
    wish = "" if enough else f"; the quickstart takes up to {_NEEDED_DISK_GIB} GiB"
    yield Finding("ok" if enough else "low", "disk", f"{free / _GIB:.1f} GiB free in {os.getcwd()}{wish}")


def memory_bytes() -> tuple[int, int]:
    """(total, available) of this machine or, when smaller, of the container's limit. Linux only, as the recipe is."""
    table = dict(re.findall(r"(\w+):\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text(encoding="ascii")))
    total, free = int(table["MemTotal"]) << 10, int(table["MemAvailable"]) << 10
    limit, used = pathlib.Path("/sys/fs/cgroup/memory.max"), pathlib.Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        total = min(total, int(text))
        free = min(free, max(0, int(text) - int(used.read_text(encoding="ascii"))))
    return total, free


# --- packages ---------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """The packages that glmv_jax cannot do without."""
    required = requirements()
    if not required:
        yield Finding("broken", "glmv_jax", f"{__version__}, imported but not installed; run {install_command('')}")
        return
    lacking = [name for name in required[""] if _version(name) is None]
    yield Finding("ok", "glmv_jax", f"{__version__} at {pathlib.Path(__file__).parent}")
    for name in lacking:
        yield Finding("broken", name, f"not installed; run {install_command('')}")
    main_ones = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")]
    yield Finding("ok", "packages", ", ".join(main_ones))


def extras() -> Iterator[Finding]:
    """Which of the optional parts are here."""
    for extra, names in requirements().items():
        if extra:
            lacking = [name for name in names if _version(name) is None]
            note = f"{', '.join(lacking)}; for it run {install_command(extra)}" if lacking else "installed"
            yield Finding("missing" if lacking else "ok", f"extra {extra}", note)


def requirements() -> dict[str, list[str]]:
    """Package names by extra ("" is the core), as the installed metadata of glmv_jax has them; {} when not installed.

    The hardware extras are jax's own extras; what they bring beside jax is its accelerator plugin.
    """
    try:
        lines = importlib.metadata.requires("glmv_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    by_extra: dict[str, list[str]] = {"": []}
    for line in lines:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        found = re.search(r"extra == [\"'](\w+)[\"']", line)
        extra = found.group(1) if found else ""
        plugin = {"cuda": "jax-cuda12-plugin", "tpu": "libtpu"}.get(extra, name)
        by_extra.setdefault(extra, []).append(plugin)
    return by_extra


def install_command(extra: str) -> str:
    """How to install an extra into this very environment: from the checkout when there is one."""
    checkout = pathlib.Path(__file__).resolve().parent.parent
    bracket = f"[{extra}]" if extra else ""
    if (checkout / "pyproject.toml").is_file():
        return f"{sys.executable} -m pip install -e '{checkout}{bracket}'"
    return f"{sys.executable} -m pip install 'glmv_jax{bracket}'"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- devices ----------------------------------------------------------------------------------------------------------


def devices() -> Iterator[Finding]:
    """The devices jax sees, and an accelerator it does not see."""
    try:
        import jax

        found = jax.devices()
    except (ImportError, RuntimeError) as error:
        yield Finding("broken", "devices", f"jax finds none: {' '.join(str(error).split())[:300]}")
        return
    for kind in dict.fromkeys((device.platform, device.device_kind) for device in found):
        same = [device for device in found if (device.platform, device.device_kind) == kind]
        limit = (same[0].memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / _GIB:.1f} GiB each" if limit else ""
        yield Finding("ok", "devices", f"{len(same)} x {kind[0]} ({kind[1]}{memory})")

    platforms = {device.platform for device in found}
    if pathlib.Path("/dev/nvidia0").exists() and "gpu" not in platforms:
        yield Finding("missing", "gpu", f"an NVIDIA GPU is here and jax does not see it; run {install_command('cuda')}")
    if pathlib.Path("/dev/accel0").exists() and "tpu" not in platforms:
        yield Finding("missing", "tpu", f"a TPU is here and jax does not see it; run {install_command('tpu')}")


# --- the embedded corpus ----------------------------------------------------------------------------------------------


def corpus_files() -> Iterator[Finding]:
    """Opens every file of the embedded corpus as its reader would."""
    from glmv_jax.data import corpus

    files = [path for path in sorted(corpus.FOLDER.rglob("*")) if path.is_file() and path.suffix not in (".py", ".pyc")]
    names = {path.name for path in files}
    wanted = ("emoji.tsv", "emoji-0.webp", "fonts.json", corpus.VOCABULARY.name)
    bad = [f"{name} is missing" for name in wanted if name not in names]
    for path in files:
        try:
            _open(path)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            bad.append(f"{path.name} cannot be read: {' '.join(str(error).split())[:120]}")
    for problem in bad:
        yield Finding("broken", "corpus", f"{problem}; reinstall: {install_command('')}")
    size = sum(path.stat().st_size for path in files)
    yield Finding("ok", "corpus", f"{len(files)} files, {size / 1e6:.1f} MB in {corpus.FOLDER}")


def _open(path: pathlib.Path) -> None:
    """Raises OSError, ValueError or RuntimeError when the file is empty or broken."""
    if not path.stat().st_size:
        raise ValueError("it is empty")
    if path.suffix in (".webp", ".png"):
        from PIL import Image

        with Image.open(path) as image:
            image.load()
    elif path.suffix in (".ttf", ".otf"):
        from PIL import ImageFont

        ImageFont.truetype(str(path), 12)
    elif path.suffix == ".model":
        import sentencepiece

        sentencepiece.SentencePieceProcessor(model_file=str(path))
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    else:
        path.read_text(encoding="utf-8")
