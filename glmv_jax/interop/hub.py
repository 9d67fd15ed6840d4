"""Where a public checkpoint is: a folder on this machine, or a name on the Hugging Face Hub that is fetched first."""

from __future__ import annotations

import re
from pathlib import Path

from glmv_jax.typing import UserError

# Weights in this format, and the small files beside them; not the same weights in other formats.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def local(source: str | Path) -> Path:
    """The folder of a checkpoint; a name "org/name" is downloaded into the Hub's cache.

    Raises UserError when there is neither such a folder nor such a name, nor a network to fetch it by.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file; give the folder it is in")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{folder}: no such folder; give a checkpoint's folder, or its name on the Hub as org/name")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{source}: no such folder, and fetching it from the Hub takes huggingface_hub; "
                        'pip install "glmv_jax[hf]"') from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(_WANTED)))
    # Of its own, of httpx, of the system: it has no type for what a download can meet.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{source}: no such folder, and it cannot be fetched from the Hub ({reason}); check the name "
                        "and the network, or give a folder") from None
