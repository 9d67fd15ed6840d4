"""Public checkpoints in and out: from Hugging Face's layout to a folder that training and generation read, and back.

    model.json                     family, what the model computes in, its config
    hf/                            config.json, tokenizer, chat template, processors: as they came
    checkpoints/0/params           the parameters, as a run has them, with checksums
    results.json                   so that it counts as a finished run: `init_from` may name it

A folder is written under another name beside it and renamed when it is whole. What is given back is an imported folder,
or a run that began from one (by `init_from` or as the base of adapters, over any number of stages).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from glmv_jax.interop import families, folder, hub, mtp
from glmv_jax.interop.arrays import write_arrays
from glmv_jax.interop.table import check_shapes
from glmv_jax.models.api import abstract_params, logical_axes
from glmv_jax.parallel import rules
from glmv_jax.train import checkpoint, weights
from glmv_jax.train.disk import disk_errors, seal, write_json
from glmv_jax.trees import flatten, nest, put_like, slash_path
from glmv_jax.typing import Params, UserError

MODEL, FILES = "model.json", "hf"
# Beside the weights everything small is kept. These are weights, here or in other formats.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".part", folder.INDEX)


class Loaded(NamedTuple):
    """A model that can answer."""

    cfg: Any
    params: Params


def import_hf(source: str | Path, target: str | Path, dtype: str | None = None) -> str:
    """A checkpoint in Hugging Face's layout (a folder, or a name on the Hub) -> a folder of ours. Returns what to say.

    dtype: what to store parameters as, "bfloat16" or "float32"; default: as they are.
    Holds a tensor at a time. Raises UserError, one line, for a target that is in the way, a disk that cannot be
    written, and as `families.open_checkpoint`; then no folder has been left.
    """
    target = Path(target).expanduser()
    kept = None if dtype is None else families.np_dtype(dtype)
    _check_target(target)
    found = families.open_checkpoint(hub.local(source), dtype)
    with whole(target) as part:
        _copy_files(found.folder, part / FILES)
        step = part / "checkpoints" / "0"
        step.mkdir(parents=True)
        write_arrays(step / "params", found.arrays, kept)
        seal(step, leave_out=("_CHECKPOINT_METADATA",))
        about = {
            "family": found.hf["model_type"], "source": str(source), "mtp": found.mtp_layers,
            "dtype": found.cfg.decoder.dtype, "repeated": list(found.repeated),
            "config": dataclasses.asdict(found.cfg),
        }  # fmt: skip
        (part / MODEL).write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
        write_json(part / "results.json", {"stage": "import", "source": str(source)})
    count = sum(_size(leaf) for leaf in found.arrays.values())
    return f"{target}: {found.hf['model_type']}, {count:,} parameters in {len(found.arrays)} arrays"


def export_hf(source: str | Path, target: str | Path, dtype: str | None = None) -> str:
    """A folder of ours, or a run that began from one -> Hugging Face's layout, complete for `from_pretrained`.

    dtype: what to write tensors as; default: as stored. Holds the arrays of a tensor at a time. Raises UserError as
    `import_hf`, and for a run that began from no public checkpoint.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    _check_target(target)
    _origin(source)  # what is none of ours is told before its weights are looked for
    return give(weights.opened(source), source, target, dtype)


def give(arrays: Mapping[str, Any], source: str | Path, target: Path, dtype: str | None = None) -> str:
    """Arrays by slash path (as `table.saved` takes them) of the model that `source` holds or began from -> Hugging
    Face's layout. As `export_hf`, but the target is not there."""
    kept = None if dtype is None else families.np_dtype(dtype)
    origin = _origin(Path(source).expanduser())
    about, hf, cfg = _model(origin)
    check_shapes(dict(arrays), abstract_params(cfg))
    tensors = families.tensors_of(hf, cfg, arrays, about["repeated"])
    with whole(target) as part:
        _copy_files(origin / FILES, part)
        _say(part / "config.json", dtype or families.stored_dtype(arrays), about["mtp"])
        folder.write_tensors(part, tensors, kept)
    return f"{target}: {hf['model_type']}, {sum(_size(t) for t in tensors):,} numbers in {len(tensors)} tensors"


def load(source: str | Path, dtype: str | None = None, mesh: Mesh | None = None) -> Loaded:
    """A model from a folder of ours, a run that began from one, or a folder in Hugging Face's layout.

    dtype: what it computes in and its parameters are; default: as stored. mesh: where they are read to, each
    device its part by the rules "serve"; default: the first device.
    Raises UserError as `families.open_checkpoint` and `checkpoint.newest`.
    """
    source = Path(source).expanduser()
    if _is_public(source):
        found = families.open_checkpoint(source, dtype)
        return Loaded(found.cfg, families.load(found, _places(found.cfg, mesh), dtype))
    origin = _origin(source)
    about, hf, cfg = _model(origin)
    if dtype is not None:
        families.np_dtype(dtype)
        cfg = families.model_config(hf, mtp_layers=about["mtp"], dtype=dtype)
    arrays = weights.opened(source)
    check_shapes(dict(arrays), abstract_params(cfg))

    def wanted(path: tuple, leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        stored = arrays[slash_path(path)].dtype
        as_dtype = stored if dtype is None else families.np_dtype(dtype)
        return jax.ShapeDtypeStruct(leaf.shape, as_dtype, sharding=sharding)

    like = jax.tree_util.tree_map_with_path(wanted, abstract_params(cfg), _places(cfg, mesh))
    if any(weights.made(source)):
        return Loaded(cfg, nest({path: put_like(arrays[path][()], x) for path, x in flatten(like).items()}))
    return Loaded(cfg, checkpoint.load_item(checkpoint.newest(source) / "params", like=like))


def _places(cfg: Any, mesh: Mesh | None) -> Params:
    shapes = abstract_params(cfg)
    if mesh is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: first, shapes)
    return rules.preset(rules.SERVE).shardings(mesh, logical_axes(cfg), shapes)


def model_config(
    source: str | Path, remat: str = "none", vision: Mapping | None = None, merger: Mapping | None = None,
    patches_at_once: int = 0,
) -> Any:
    """The config of the model in a folder of ours, or in a run that began from one, with what it keeps for backward
    passes: remat of the decoder and, unless `vision` says else, of the encoder; the others as in `presets.public`."""
    _, _, cfg = _model(_origin(Path(source).expanduser()))
    decoder = dataclasses.replace(cfg.decoder, remat=remat)
    mtp = cfg.mtp and dataclasses.replace(cfg.mtp, decoder=decoder)
    vision = cfg.vision and dataclasses.replace(cfg.vision, **{"remat": remat, **(vision or {})})
    merger = cfg.merger and dataclasses.replace(cfg.merger, **(merger or {}))
    return dataclasses.replace(
        cfg, vision=vision, merger=merger, decoder=decoder, mtp=mtp, patches_at_once=patches_at_once
    )


def family(source: str | Path) -> str:
    """The model_type of the checkpoint that a folder of ours holds, or that a run began from."""
    _, hf, _ = _model(_origin(Path(source).expanduser()))
    return hf["model_type"]


def computes_in(source: str | Path) -> str:
    """The dtype that the model computes in which a folder of ours holds, or which a run began from."""
    about, _, _ = _model(_origin(Path(source).expanduser()))
    return about["dtype"]


def files(source: str | Path) -> Path:
    """The folder with the tokenizer and the other small files of what `load` takes."""
    source = Path(source).expanduser()
    if not source.is_dir():
        raise UserError(f"{source} is no folder; give a checkpoint")
    return source if _is_public(source) else _origin(source) / FILES


def is_of_public(source: str | Path) -> bool:
    """Whether a folder holds a public checkpoint, or a run that began from one: what `load` takes."""
    try:
        files(source)
    except UserError:
        return False
    return True


def _is_public(source: Path) -> bool:
    """Whether it is in Hugging Face's layout: of ours none has a config.json without checkpoints."""
    return (source / "config.json").exists() and not (source / "checkpoints").exists()


def _origin(source: Path) -> Path:
    """The imported folder that `source` is, or that its run began from."""
    seen: list[Path] = []
    at = source
    while not (at / MODEL).is_file():
        seen.append(at.absolute())
        cfg = checkpoint.load_config(at) if (at / "config.json").is_file() else {}
        before = cfg.get("init_from", "") or cfg.get("lora", {}).get("base", "")
        if not before or Path(before).absolute() in seen:
            raise UserError(f"{source} is no imported checkpoint and did not begin from one ({at} has no {MODEL}); "
                            "give the folder that glmv import-hf wrote, or a run whose init_from leads to it; a run of "
                            "the recipe's own goes on with experiments/vlm_sft.py and --config.init_from")
        at = Path(before).expanduser()
    return at


def _model(origin: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(model.json, config.json, the model's config) of an imported folder."""
    path = origin / MODEL
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        about["mtp"] = int(about["mtp"])  # it was true or false
        dtype, _ = about["dtype"], about["repeated"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); import it again") from None
    hf = folder.read_config(origin / FILES)
    return about, hf, families.model_config(hf, mtp_layers=about["mtp"], dtype=dtype)


def _size(array: Any) -> int:
    size = 1
    for n in array.shape:
        size *= n
    return size


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not empty; give another folder, or remove it first")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give a folder")


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, and is removed when it does not."""
    part = target.absolute().with_name(target.absolute().name + ".part")
    with disk_errors(target):
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
        part.mkdir()
        try:
            yield part
            os.replace(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)


def _say(path: Path, dtype: str, mtp_layers: int) -> None:
    """Writes what the weights are now into config.json, where it says what they were, and MTP layers if several."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = dtype
    if mtp_layers > 1:
        mtp.text_part(config)[mtp.COUNT] = mtp_layers
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
