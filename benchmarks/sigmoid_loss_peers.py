"""What do the sigmoid loss and its gradient cost in time and memory, against open_clip's over torch.distributed?

For each number of devices W and batch B, features of width E in float32: loss and gradients of images, texts, scale and
bias. Ours are `ring_bidir`, `allgather_chunked` (texts travel in float32, as open_clip's do, unless --wire says
otherwise) and `dense`, the plain B x B product left to GSPMD and autodiff. open_clip's SigLipLoss runs its ways
of exchanging texts in W processes over gloo; on a GPU W = 1, nothing is exchanged, and both sides multiply in TF32.
Prints one JSON line.

    python benchmarks/sigmoid_loss_peers.py [--devices 2 4] [--batches 2048 8192] [--widths 1024] [--out FILE]

On a CPU our W devices are emulated in one process and share one pool of threads, the W processes of torch have their
threads; both sides may use the same cores (--threads, divided among torch's processes, one each at least). Memory is
measured the same way on both sides: how far the resident memory of the processes, all of them together, rises at its
highest during a call above what it is before (on a GPU: the allocator's peak of torch, temporary memory and results of
our compiled program). "saved" of torch is what autograd keeps between forward and backward, "temporary" of ours what
XLA allots for the whole program, of all devices. The loss of each is compared with the same in float64 NumPy.

open_clip's package need not be installed: `--open-clip` takes the path of its `src/open_clip/loss.py`, which needs
torch alone.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import pathlib
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from contest import Contender, Failed, device, emit, environment, in_turns, log, save, serve, significant, spread

OURS = ("ring_bidir", "allgather_chunked", "dense")
OPEN_CLIP = ("bidir", "shift", "reduce", "gather")
SCALE, BIAS = 10.0, -10.0

Spec = dict[str, Any]


def features(batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts of unit norm, float32 [B, E]; a text is near its image."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, width), np.float32)
    text = image + rng.standard_normal((batch, width), np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))


def reference(batch: int, width: int) -> float:
    """The loss in float64, some rows at a time."""
    image, text = (x.astype(np.float64) for x in features(batch, width))
    total = 0.0
    for start in range(0, batch, 512):
        logits = SCALE * image[start : start + 512] @ text.T + BIAS
        total += np.logaddexp(0.0, logits).sum()
    return (total - (SCALE * (image * text).sum(1) + BIAS).sum()) / batch


def resident_rise(run: Callable[[], Any]) -> float:
    """How far the resident memory of this process rises during a call above what it is before, in MB.

    From here on glibc maps what is larger than 64 kB anew and unmaps it when it is free, so that memory of the calls
    before does not hide what this one needs. That costs time: measure time before.
    """
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    run()
    libc.malloc_trim(0)
    before = _resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    run()
    return (_resident("VmHWM") - before) / 1e3


def _resident(name: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1.024 for line in lines if line.startswith(name))


class Side:
    """A subclass has run(), which returns the loss when all is done."""

    def prepare(self) -> float:
        """The loss; two calls, so that what is allotted once is there."""
        return [self.run() for _ in range(2)][-1]

    def turn(self, repeats: int) -> list[list[float]]:
        """Seconds of each call from when all processes were ready for it: on the clock, and of this one's threads."""
        times = []
        for _ in range(repeats):
            self.together()
            began = time.perf_counter(), time.process_time()
            self.run()
            times.append([time.perf_counter() - began[0], time.process_time() - began[1]])
        return times

    def together(self) -> None:
        """Waits for the other processes, if there are any."""


class Ours(Side):
    def __init__(self, spec: Spec) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from glmv_jax.losses.sigmoid import sigmoid_loss
        from glmv_jax.parallel.mesh import make_mesh

        self.jax, self.spec = jax, spec
        mesh = make_mesh({"data": spec["devices"]})
        rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        data = [jax.device_put(x, rows) for x in features(spec["batch"], spec["width"])]
        scalars = [jax.device_put(jnp.float32(x), everywhere) for x in (np.log(SCALE), BIAS)]
        self._args = [*data, *scalars]

        def loss(*args):
            return sigmoid_loss(*args, impl=spec["impl"], mesh=mesh, chunk=spec["chunk"], wire=spec["wire"])[0]

        out = (everywhere, (rows, rows, everywhere, everywhere))
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), out_shardings=out)
        self._compiled = step.lower(*self._args).compile()

    def run(self) -> float:
        loss, _ = self.jax.block_until_ready(self._compiled(*self._args))
        return float(loss)

    def memory(self) -> dict[str, float]:
        found = self._compiled.memory_analysis()
        mega = self.spec["devices"] / 1e6  # of all devices, in MB
        temporary, results = mega * found.temp_size_in_bytes, mega * found.output_size_in_bytes
        # On a GPU a compiled program takes what it said and nothing else.
        rise = resident_rise(self.run) if self.jax.default_backend() == "cpu" else temporary + results
        return {"rise": rise, "temporary": temporary}


class OpenClip(Side):
    """One rank of W."""

    def __init__(self, spec: Spec) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(spec["threads"])
        self.torch, self.dist, self.spec = torch, dist, spec
        rank, world = spec["rank"], spec["devices"]
        if world > 1:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{spec['port']}", rank=rank, world_size=world)
        place = torch.device(spec["device"])
        torch.set_float32_matmul_precision("high")  # on a GPU TF32, which is what XLA takes there
        self._loss = open_clip_loss(spec["open_clip"]).SigLipLoss(rank=rank, world_size=world, dist_impl=spec["impl"])
        n = spec["batch"] // world
        mine = [x[rank * n : (rank + 1) * n] for x in features(spec["batch"], spec["width"])]
        scalars = [np.float32(np.log(SCALE)), np.float32(BIAS)]
        self._args = [torch.tensor(x, device=place, requires_grad=True) for x in (*mine, *scalars)]

    def run(self) -> float:
        """The mean over ranks of their losses is the loss; their sums of gradients are W times its gradient."""
        for x in self._args:
            x.grad = None
        image, text, log_scale, bias = self._args
        loss = self._loss(image, text, log_scale.exp(), bias)
        loss.backward()
        if image.is_cuda:
            self.torch.cuda.synchronize()
        return loss.item()

    def together(self) -> None:
        if self.spec["devices"] > 1:
            self.dist.barrier()

    def memory(self) -> dict[str, float]:
        saved: dict[int, int] = {}

        def pack(x):
            storage = x.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return x

        self.together()
        if self._args[0].is_cuda:
            before = self.torch.cuda.memory_allocated()
            self.torch.cuda.reset_peak_memory_stats()
            self.run()
            rise = (self.torch.cuda.max_memory_allocated() - before) / 1e6
        else:
            rise = resident_rise(self.run)
        self.together()
        with self.torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.run()
        inputs = sum(x.untyped_storage().nbytes() for x in self._args)
        return {"rise": rise, "saved": (sum(saved.values()) - inputs) / 1e6}


def open_clip_loss(path: str) -> Any:
    """The module `loss.py` of open_clip alone; the package needs torchvision."""
    if not path:
        spec = importlib.util.find_spec("open_clip")
        if spec is None:
            raise ImportError("open_clip is not installed; pip install open_clip_torch, or give --open-clip")
        path = os.path.join(spec.submodule_search_locations[0], "loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the contest ------------------------------------------------------------------------------------------------------


class Group:
    """The processes of one side, asked together."""

    def __init__(self, name: str, specs: list[Spec], env: dict[str, str]) -> None:
        self.name, self._members = name, [Contender(__file__, spec, env) for spec in specs]

    def ask(self, method: str, timeout: float, **arguments: Any) -> list[Any]:
        for member in self._members:
            member.tell(method, **arguments)
        return [member.answer(timeout) for member in self._members]

    def close(self) -> None:
        for member in self._members:
            member.close()


class Contest:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.failed = args, {}
        self.cores = sorted(os.sched_getaffinity(0))[: args.threads]

    def group(self, side: str, impl: str, devices: int, batch: int, width: int) -> Group:
        args, place = self.args, self.args.device
        spec = dict(name=f"{side} {impl}", side=side, impl=impl, devices=devices, batch=batch, width=width,
                    cores=self.cores, device=place)  # fmt: skip
        if side == "ours":
            flags = "" if place == "cuda" else f" --xla_force_host_platform_device_count={devices}"
            env = {"JAX_PLATFORMS": place, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flags,
                   "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # fmt: skip
            return Group(spec["name"], [spec | {"chunk": args.chunk, "wire": args.wire}], env)
        threads = max(1, args.threads // devices)
        more = dict(threads=threads, port=free_port(), open_clip=args.open_clip)
        ranks = [spec | more | {"rank": rank} for rank in range(devices)]
        return Group(spec["name"], ranks, {"OMP_NUM_THREADS": str(threads)})

    def setting(self, devices: int, batch: int, width: int) -> dict[str, Any]:
        """All sides at one size: started together, asked in turns."""
        wanted = [("ours", impl) for impl in self.args.ours] + [("open_clip", impl) for impl in self.args.peers]
        loss = reference(batch, width)
        started = [self.group(side, impl, devices, batch, width) for side, impl in wanted]
        groups: dict[str, Group] = {}
        rows: dict[str, dict[str, Any]] = {}
        for group in started:
            try:
                losses = group.ask("prepare", self.args.patience)
            except Failed as failure:
                self.failed[f"W={devices} B={batch} E={width} {group.name}"] = str(failure)
                log("failed", failure)
                group.close()
                continue
            groups[group.name] = group
            error = abs(statistics.mean(losses) / loss - 1)
            rows[group.name] = {"loss, relative error": significant(error, 2)}
        runs = {name: functools.partial(self.together, group) for name, group in groups.items()}
        try:
            for name, times in in_turns(runs, self.args.rounds, self.args.seconds).items():
                clock, processor = zip(*(call for turn in times for call in turn))
                rows[name] |= {"ms": spread([1e3 * t for t in clock]),
                               "processor ms": spread([1e3 * t for t in processor])}  # fmt: skip
            for name, group in groups.items():
                memory = group.ask("memory", self.args.patience)
                rows[name] |= {f"{kind} MB": significant(sum(m[kind] for m in memory)) for kind in memory[0]}
        except Failed as failure:
            self.failed[f"W={devices} B={batch} E={width}"] = str(failure)
        for group in groups.values():
            group.close()
        log(devices, batch, width, rows)
        return {"devices": devices, "batch": batch, "width": width, "loss": loss, "sides": rows, "ratios": ratios(rows)}

    def together(self, group: Group) -> list[tuple[float, float]]:
        """Of each call: seconds until its last process was done, and processor seconds of all of them."""
        calls = zip(*group.ask("turn", self.args.patience, repeats=self.args.repeats))
        return [(max(clock for clock, _ in call), sum(spent for _, spent in call)) for call in calls]


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each other side over each of ours that needs no B x B product: above 1, ours is the better one."""
    whole = {name: row for name, row in rows.items() if "rise MB" in row}
    chunked = [name for name in ("ours ring_bidir", "ours allgather_chunked") if name in whole]
    return {
        f"{name} / {ours}": {
            "time": significant(row["ms"]["median"] / whole[ours]["ms"]["median"], 3),
            "processor time": significant(row["processor ms"]["median"] / whole[ours]["processor ms"]["median"], 3),
            "memory": significant(row["rise MB"] / max(whole[ours]["rise MB"], 0.1), 3),
        }
        for ours in chunked
        for name, row in whole.items()
        if name not in chunked
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", help="default: 1 on a GPU, else 2 4")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024])
    parser.add_argument("--ours", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--peers", nargs="*", choices=OPEN_CLIP, default=["bidir", "gather"])
    parser.add_argument("--chunk", type=int, default=1024, help="rows of logits at a time, of ours")
    parser.add_argument("--wire", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="calls of a turn")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the rounds of one size")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds until a side that is silent has failed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--open-clip", default="", help="path of open_clip's loss.py, where it is not installed")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        spec = json.loads(args.contender)
        serve(Ours if spec["side"] == "ours" else OpenClip, spec)
    args.device = device(args.device)
    args.devices = args.devices or ([1] if args.device == "cuda" else [2, 4])
    contest = Contest(args)
    sizes = [(w, b, e) for w in args.devices for b in args.batches for e in args.widths]
    about = {name: getattr(args, name) for name in ("device", "wire", "chunk", "threads")}
    record = {"benchmark": "sigmoid_loss_peers", "dtype": "float32", **about, "sizes": [], "failed": contest.failed,
              **environment()}  # fmt: skip
    for size in sizes:
        record["sizes"].append(contest.setting(*size))
        save(record, args.out)  # what is known, should anything end us
    emit(record, args.out)


if __name__ == "__main__":
    main()
