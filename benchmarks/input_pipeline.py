"""How many images a second does the input of stage 2 make, from JPEGs in a tar to NaFlex batches, against PyTorch's?

Each image: read from the tar at random, decoded, resized to the largest size of its aspect ratio within 256 patches of
14 px, cut into patches, padded to 256, and batched by 64. Prints one JSON line: for 0, 1, 2, ... worker
processes the images/s of ours and each peer and their ratio, the same per second of processor time (what a core does,
however many there are and whatever else runs), and what one image costs by stage.

    python benchmarks/input_pipeline.py [--workers 0 1 2] [--images 600] [--peers timm torchvision] [--out FILE]

The JPEGs are crops of scikit-image's photographs, of six sizes from 500x375 to 640x480, quality 90. Peers, each under
torch's DataLoader with as many workers:

    timm         Pillow, and timm's ResizeToSequence, Patchify and NaFlexCollator (timm's own way to NaFlex batches)
    torchvision  torchvision's decode_jpeg, resize of uint8 tensors and normalise; timm's patchify and collator

Ours rounds sides to 28 px (2x2 patches stay together) and theirs to 14 px, so patches an image differ a little; they
are counted. Ours hold pixels as bytes, which the tower normalises on the device; theirs are normalised, as floats, by
the pipeline, which is its own line of what an image costs.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from contest import Contender, Failed, device, emit, environment, in_turns, log, save, serve, significant, spread
from PIL import Image

PATCH, BUDGET = 14, 256
FORMS = ((500, 375), (375, 500), (500, 333), (640, 480), (480, 640), (512, 512))
PEERS = ("timm", "torchvision")

Spec = dict[str, Any]


def write_tar(path: str, images: int) -> float:
    """JPEGs 000000.jpg, ... in a tar; returns their mean size in kB."""
    from glmv_jax.data import photos

    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "ihc.png")
    originals = [Image.open(photos.folder() / name).convert("RGB") for name in names]
    rng, sizes = np.random.default_rng(0), []
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            photo, (width, height) = originals[i % len(originals)], FORMS[int(rng.integers(len(FORMS)))]
            side = rng.uniform(0.6, 1.0) * min(photo.width / width, photo.height / height)
            x, y = rng.uniform(0, photo.width - side * width), rng.uniform(0, photo.height - side * height)
            box = (x, y, x + side * width, y + side * height)
            buffer = io.BytesIO()
            photo.resize((width, height), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = buffer.tell()
            sizes.append(member.size)
            buffer.seek(0)
            tar.addfile(member, buffer)
    return statistics.mean(sizes) / 1e3


class Side:
    """A subclass has batches() -> endless iterator, arrays(batch) -> its arrays by name, patches(batch) -> how many are
    no padding, to_device(arrays), and stages(i) -> (name, seconds) of image i."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._batches: Iterator[Any] | None = None

    def prepare(self) -> dict[str, float]:
        """Starts the workers; says what a batch is."""
        self._batches = self.batches()
        batch = next(self._batches)
        size = sum(x.nbytes for x in self.arrays(batch).values())
        return {"patches an image": self.patches(batch) / self.spec["batch"], "MB a batch": size / 1e6}

    def turn(self, batches: int) -> list[float]:
        """Images/s, and images per second of processor time.

        What was made while others had their turn is drawn first, and is not counted: two batches a worker that torch
        keeps ready, those each worker has in hand, and what our thread makes ahead.
        """
        for _ in range(3 * self.spec["workers"] + 4):
            next(self._batches)
        began, spent = time.perf_counter(), processor_seconds()
        for _ in range(batches):
            next(self._batches)
        images = batches * self.spec["batch"]
        return [images / (time.perf_counter() - began), images / (processor_seconds() - spent)]

    def costs(self, images: int) -> dict[str, float]:
        """Milliseconds of each stage an image, one after the other in one thread, of its processor time; what a batch
        takes to the device is on the clock."""
        total: dict[str, float] = {}
        for name, seconds in itertools.chain.from_iterable(self.stages(i) for i in range(images)):
            total[name] = total.get(name, 0.0) + seconds
        if self.spec["device"] == "cuda":
            arrays = self.arrays(next(self.batches()))
            spent = []
            for _ in range(5):
                began = time.perf_counter()
                self.to_device(arrays)
                spent.append(time.perf_counter() - began)
            total["to the device"] = min(spent) * images / self.spec["batch"]
        return {name: significant(1e3 * seconds / images, 3) for name, seconds in total.items()}


def processor_seconds() -> float:
    """Of this process and its worker processes."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def timed(name: str, function: Callable, *arguments: Any) -> tuple[Any, tuple[str, float]]:
    """Its result, and (name, seconds of this thread)."""
    began = time.thread_time()
    result = function(*arguments)
    return result, (name, time.thread_time() - began)


# --- ours -------------------------------------------------------------------------------------------------------------


def decode(data: bytes, patcher: Any) -> Image.Image:
    """The picture of a record of stage 2, at the patcher's size."""
    from glmv_jax.data.pairs.picture import sized

    return sized(data, patcher)


def row(record: tuple[str, dict[str, bytes]], rng: np.random.Generator, *, patcher: Any) -> dict[str, np.ndarray]:
    """The image part of a row of stage 2."""
    from glmv_jax.data.pipeline import vision_row

    patches = patcher(decode(record[1]["jpg"], patcher))
    return vision_row(*patches, patcher.max_patches) | {"concept": np.int32(int(record[0][-6:]))}


class Ours(Side):
    """As `pipeline` puts stage 2 together: shuffled, guarded, made in workers, batched, batches made ahead."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        from glmv_jax.data.naflex import Patcher
        from glmv_jax.data.tars import Tars

        self.tars, self.patcher = Tars(spec["tar"], cache=""), Patcher(PATCH, max_patches=BUDGET)

    def batches(self):
        from glmv_jax.data.pipeline import Reading
        from glmv_jax.data.stream import Stream, UniqueBatchIterDataset

        reading = Reading(workers=self.spec["workers"])
        made = functools.partial(row, patcher=self.patcher)
        rows = Stream(reading.guarded(reading.endless(self.tars), made, "tars"), reading.workers, chunk=32)
        return reading.iterator(UniqueBatchIterDataset(rows, self.spec["batch"], "concept", below=0))

    def arrays(self, batch) -> dict[str, np.ndarray]:
        return batch

    def patches(self, batch) -> int:
        return int((batch["frame"] > 0).sum())

    def to_device(self, arrays) -> None:
        import jax

        jax.block_until_ready(jax.device_put(arrays))

    def stages(self, i: int):
        from glmv_jax.data.naflex import patchify
        from glmv_jax.data.pipeline import vision_row

        p = self.patcher
        record, read = timed("read", self.tars.__getitem__, i)
        image, decoded = timed("decode and resize", decode, record[1]["jpg"], p)
        patches, cut = timed("patchify", lambda: patchify(np.asarray(image), p.patch, p.merge))
        padded, full = timed("pad", vision_row, *patches, BUDGET)
        copies, stacked = timed("batch", lambda: {name: np.stack([x] * 8) for name, x in padded.items()})
        _, sent = timed("send, with workers", lambda: pickle.loads(pickle.dumps(padded, protocol=5)))
        return [read, decoded, cut, full, (stacked[0], stacked[1] / 8), sent]


# --- PyTorch ----------------------------------------------------------------------------------------------------------


class Indexed:
    """Random access to the members of a tar, for torch's DataLoader."""

    def __init__(self, path: str, transform: Callable[[bytes], Any]) -> None:
        self.path, self.transform, self._file = path, transform, None
        with tarfile.open(path) as tar:
            self._members = [(member.offset_data, member.size) for member in tar]

    def __len__(self) -> int:
        return len(self._members)

    def read(self, i: int) -> bytes:
        if self._file is None:  # each worker has its own
            self._file = os.open(self.path, os.O_RDONLY)
        offset, size = self._members[i]
        return os.pread(self._file, size, offset)

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.read(i)), i


class Torch(Side):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import torch
        from timm.data.naflex_dataset import NaFlexCollator
        from timm.data.naflex_transforms import Patchify, ResizeToSequence
        from torchvision import transforms

        from glmv_jax.typing import CLIP_MEAN, CLIP_STD

        torch.set_num_threads(1)  # as the DataLoader sets it in its workers
        self.torch, self.collate = torch, NaFlexCollator(BUDGET)
        resize = ResizeToSequence(PATCH, BUDGET, interpolation="bicubic")
        normalise = transforms.Normalize(CLIP_MEAN, CLIP_STD)
        if spec["name"] == "timm":
            decode_ = lambda data: Image.open(io.BytesIO(data)).convert("RGB")  # noqa: E731
            scale = transforms.ToTensor()
        else:
            from torchvision.io import ImageReadMode, decode_jpeg

            decode_ = lambda data: decode_jpeg(  # noqa: E731
                torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            scale = transforms.ConvertImageDtype(torch.float32)
        self._steps = {"decode": decode_, "resize": resize, "normalise": lambda x: normalise(scale(x)),
                       "patchify": Patchify(PATCH)}  # fmt: skip
        self.data = Indexed(spec["tar"], self._transform)

    def _transform(self, data: bytes):
        return functools.reduce(lambda x, step: step(x), self._steps.values(), data)

    def batches(self):
        # Workers are forked, as is torch's default on Linux.
        loader = self.torch.utils.data.DataLoader(
            self.data, self.spec["batch"], shuffle=True, num_workers=self.spec["workers"], collate_fn=self.collate,
            drop_last=True, persistent_workers=self.spec["workers"] > 0)
        return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def arrays(self, batch) -> dict[str, Any]:
        return {name: x for name, x in batch[0].items() if isinstance(x, self.torch.Tensor)}

    def patches(self, batch) -> int:
        return int(batch[0]["patch_valid"].sum())

    def to_device(self, arrays) -> None:
        for x in arrays.values():
            x.to("cuda")
        self.torch.cuda.synchronize()

    def stages(self, i: int):
        value, read = timed("read", self.data.read, i)
        times = [read]
        for name, step in self._steps.items():
            value, spent = timed(name, step, value)
            times.append(spent)
        _, collated = timed("batch", self.collate, [(value, i)] * 8)
        return [*times, (collated[0], collated[1] / 8)]


# --- the contest ------------------------------------------------------------------------------------------------------


def setting(args: argparse.Namespace, tar: str, workers: int, failed: dict[str, str]) -> dict[str, Any]:
    """All sides with so many workers, in turns."""
    sides: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {}
    env = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": args.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for name in ("ours", *args.peers):
        side = Contender(__file__, dict(name=name, tar=tar, workers=workers, batch=args.batch, device=args.device), env)
        try:
            rows[name] = {key: significant(value) for key, value in side.ask("prepare", 120).items()}
            if workers == 0:
                rows[name]["ms an image"] = side.ask("costs", 120, images=min(args.images, 200))
            sides[name] = side
        except Failed as failure:
            failed[f"{workers} workers, {name}"] = str(failure)
            log("failed", failure)
            side.close()
    runs = {name: functools.partial(side.ask, "turn", 300, batches=args.batches) for name, side in sides.items()}
    for name, found in in_turns(runs, args.rounds, args.seconds).items():
        clock, processor = zip(*found)
        rows[name] |= {"images/s": spread(clock), "images / processor second": spread(processor)}
    for side in sides.values():
        side.close()
    for name in args.peers:
        if name in sides and "ours" in sides:
            rows[name]["ours / peer"] = {
                unit: significant(rows["ours"][unit]["median"] / rows[name][unit]["median"], 3)
                for unit in ("images/s", "images / processor second")
            }
    log(workers, rows)
    return {"workers": workers, "sides": {name: row for name, row in rows.items() if name in sides}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=600, help="in the tar")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the rounds of one number of workers")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="that batches go to; default: cuda if there is one")
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        spec = json.loads(args.contender)
        serve(Ours if spec["name"] == "ours" else Torch, spec)
    args.device = device(args.device)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tar = os.path.join(folder, "photographs.tar")
        kilobytes = write_tar(tar, args.images)
        record = {"benchmark": "input_pipeline", "images": args.images, "kB an image": significant(kilobytes, 3),
                  "batch": args.batch, "patch": PATCH, "patches": BUDGET, "device": args.device, "workers": [],
                  "failed": failed, **environment()}  # fmt: skip
        for workers in args.workers:
            record["workers"].append(setting(args, tar, workers, failed))
            save(record, args.out)  # what is known, should anything end us
    emit(record, args.out)


if __name__ == "__main__":
    main()
