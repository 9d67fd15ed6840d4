"""Rebuilds the embedded corpus in place: `python -m glmv_jax.data.corpus.build emoji|fonts|vocab|all`.

Needed only by people who change the corpus. Debian packages (versions of the shipped files in brackets):
fonts-noto-color-emoji (2.042), unicode-cldr-core (41), fonts-dejavu-core (2.37), fonts-lato (2.0),
fonts-roboto-unhinted (20170802), fonts-liberation2 (2.1.5), fonts-open-sans (1.11), fonts-noto-cjk (20220127).
Python packages: emoji (2.16), fonttools (4.68), sentencepiece, and a Pillow with Raqm.

`emoji` must come first, then `fonts` (it subsets to the characters of the names), then `vocab` (it samples the question
generators, which draw with both).
"""

from __future__ import annotations

import pathlib
import sys

from glmv_jax.data import corpus
from glmv_jax.typing import UserError

LIMIT_BYTES = 6_000_000


def require(file: str, package: str) -> pathlib.Path:
    """The installed file `file`, or a UserError that names the Debian package it comes from."""
    found = pathlib.Path(file)
    if not found.exists():
        raise UserError(f"{file} is missing; apt-get install {package}")
    return found


def ship_licence(package: str) -> None:
    """Copies the copyright notice and licence that Debian ships with `package` beside the corpus."""
    notice = require(f"/usr/share/doc/{package}/copyright", package).read_bytes()
    (corpus.FOLDER / "licenses" / f"{package}.txt").write_bytes(notice)
    # The notices of Apache-2.0 fonts name this file instead of quoting it.
    apache = require("/usr/share/common-licenses/Apache-2.0", "base-files").read_bytes()
    (corpus.FOLDER / "licenses" / "Apache-2.0.txt").write_bytes(apache)


def shipped_bytes() -> int:
    """Bytes of everything in the corpus folder but its Python files."""
    files = [f for f in corpus.FOLDER.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    return sum(f.stat().st_size for f in files)


def main(args: list[str]) -> int:
    # Here, because the parts import this module for `require` and `ship_licence`.
    from glmv_jax.data.corpus import build_emoji, build_fonts, build_vocab

    parts = {"emoji": build_emoji.build, "fonts": build_fonts.build, "vocab": build_vocab.build}
    wanted = list(parts) if args == ["all"] else args
    if not wanted or not set(wanted) <= set(parts):
        print(f"usage: python -m glmv_jax.data.corpus.build {'|'.join(parts)}|all", file=sys.stderr)
        return 2
    try:
        for part in wanted:
            print(f"{part}: {parts[part]()}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    total = shipped_bytes()
    print(f"shipped: {total / 1e6:.2f} MB of at most {LIMIT_BYTES / 1e6:.0f} MB")
    return 0 if total <= LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
