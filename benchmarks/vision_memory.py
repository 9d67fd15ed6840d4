"""What memory does a further image cost a device while it learns from it, by the policies of encoder and merger?

    python benchmarks/vision_memory.py                         one GPU (peak and time are measured), or this CPU
    python benchmarks/vision_memory.py --topology v5p:2x2x1    compiled for TPUs that are not there, see `glmv compile`
    python benchmarks/vision_memory.py --size s --time         a small encoder, timed on a CPU too

CogViT-L and the merger of GLM-5V, the gradient of all their parameters with respect to the visual tokens' mean square.
An image is `--patches` patches. "in a row": further images stand in the one row of a device, and attention may not
cross; "in rows": each has a row of its own. On a CPU, whose attention writes its scores, only the latter.

The slope is (temporary bytes of the most images - of the fewest) / the images between, by the compiler's memory
analysis; "of plain" is its share of what it is without a policy. Beside few images a floor can hide it, weights in
other forms (1 GB here, the merger's): take as many as a step has. On a TPU "estimated s" is the compiler's estimate
of what is no transfer. Where steps are run: medians of steps in turns, with the order reversed every other round,
after loss and gradient norm of all policies have been found to agree.

Prints one JSON line; with --out it is kept, and drawn beside it as .svg.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import contest

TOPOLOGY = next((b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--topology"), "")
if TOPOLOGY:  # before jax
    from glmv_jax.aot import topology as topology_lib

    topology_lib.described_only()

CHUNK = 1024  # patches
POLICIES = {  # of the encoder, of the merger; patches that pass both at a time, in images
    "plain": ({}, {}, 0),
    "dots": (dict(remat="dots"), dict(remat="dots"), 0),
    "full": (dict(remat="full"), dict(remat="full"), 0),
    "full, chunks": (dict(remat="full", chunk=CHUNK), dict(chunk=CHUNK), 0),
    "offload": (dict(remat="offload"), dict(remat="offload"), 0),
    "offload, chunks": (dict(remat="offload", chunk=CHUNK), dict(remat="offload", chunk=CHUNK), 0),
    "few at once": (dict(remat="dots"), {}, 2),
}
SIZES = {
    "l": dict(depth=24, width=1024, heads=16, mlp=4096, patch=14),
    "s": dict(depth=12, width=384, heads=6, mlp=1024, patch=14),
}
MERGED = {"l": 6144, "s": 512}


class Side:
    """The gradient under one policy, for any number of images."""

    def __init__(self, spec: dict) -> None:
        import jax

        from glmv_jax.models import cogvit
        from glmv_jax.parallel import mesh as mesh_lib
        from glmv_jax.parallel import rules as rules_lib

        self.spec, self.jax, self.rules = spec, jax, rules_lib
        vision, merger, images = POLICIES[spec["policy"]]
        size, width, dtype = SIZES[spec["size"]], MERGED[spec["size"]], spec["dtype"]
        self.vision = cogvit.CogViTConfig(**size, dtype=dtype, **vision)
        self.merger = cogvit.MergerConfig(size["width"], width, 3 * width, dtype=dtype, **merger)
        self.at_once = images * spec["patches"]
        self.topology = topology_lib.parse(spec["topology"]) if spec["topology"] else None
        devices = self.topology.devices if self.topology else jax.devices()[:1]
        self.mesh = mesh_lib.make_mesh({"data": len(devices)}, devices)
        self._kept = {}

    def config(self):
        from glmv_jax import models

        decoder = models.DecoderConfig(width=self.merger.width)  # of which nothing is used
        return models.VLMConfig(self.vision, self.merger, decoder, None, self.at_once)

    def lowered(self, images: int, form: str):
        jax, spec = self.jax, self.spec
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from glmv_jax import models
        from glmv_jax.models import vlm
        from glmv_jax.typing import VisionInput

        cfg, n = self.config(), self.mesh.size
        whole, split = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        rows, length = (n, images * spec["patches"]) if form == "in a row" else (n * images, spec["patches"])
        put = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, length, *s), dtype, sharding=split)  # noqa: E731
        vision = VisionInput(put(3 * self.vision.patch**2, dtype=jnp.uint8), put(2), put())
        parts = {"vision": models.abstract_params(self.vision), "merger": models.abstract_params(self.merger)}
        parts = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), parts)

        def loss(params, vision):
            return jnp.square(vlm.encode_images(cfg, params, vision).astype(jnp.float32)).mean()

        with self.rules.use(self.mesh, self.rules.preset("data")):
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(whole, jax.tree.map(lambda _: whole, parts)))
            return step.lower(parts, vision), (parts, vision)

    def compile(self, images: int, form: str) -> dict:
        """What the compiler says, MB."""
        began = time.monotonic()
        lowered, shapes = self.lowered(images, form)
        program = lowered.compile()
        self._kept[images, form] = program, shapes
        stats = program.memory_analysis()
        found = {"temporary": stats.temp_size_in_bytes / 1e6, "host": stats.host_temp_size_in_bytes / 1e6}
        found |= {"compile s": round(time.monotonic() - began, 1)}
        if self.topology:
            from glmv_jax.aot import report

            told = report.of_text(program.as_text(), self.topology)
            found["estimated s"] = contest.significant(told["estimated_compute_seconds"])
            del self._kept[images, form]
        return found

    def start(self, images: int, form: str) -> dict:
        """Makes inputs and parameters; loss and gradient norm of one step, and where the device counts it, its peak."""
        import numpy as np
        import optax

        from glmv_jax import models

        jax = self.jax
        self.program, (params, vision) = self._kept[images, form]
        keys = jax.random.split(jax.random.key(0))
        self.params = {"vision": models.init_params(self.vision, keys[0]),
                       "merger": models.init_params(self.merger, keys[1])}  # fmt: skip
        self.params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), self.params, params)
        rng, side = np.random.default_rng(0), int(self.spec["patches"] ** 0.5)
        rows, length = vision.frame.shape
        image = np.arange(self.spec["patches"])
        yx = np.tile(np.stack([image // side, image % side], -1), (rows, length // len(image), 1)).astype(np.int32)
        frame = np.tile(np.repeat(np.arange(1, length // len(image) + 1), len(image)), (rows, 1)).astype(np.int32)
        patches = rng.integers(0, 256, vision.patches.shape, dtype=np.uint8)
        self.input = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), type(vision)(patches, yx, frame), vision)
        loss, grads = self.program(self.params, self.input)
        found = {"loss": float(loss), "norm": float(optax.tree.norm(grads))}
        memory = self.jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["peak"] = memory["peak_bytes_in_use"] / 1e6
        return found

    def steps(self, times: int) -> float:
        """Milliseconds of a step."""
        began = time.perf_counter()
        for _ in range(times):
            out = self.program(self.params, self.input)
        self.jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - began) / times


# --- what is asked of them --------------------------------------------------------------------------------------------


def memory_of(side, counts: list[int], forms: list[str], running: bool) -> dict:
    """By form: what each number of images takes. Ascending, so that a process' peak is that of the last one."""
    found = {}
    for form in forms:
        rows = {}
        for images in counts:
            rows[images] = side.ask("compile", images=images, form=form)
            if running:
                rows[images] |= side.ask("start", images=images, form=form)
            contest.log(side.name, form, images, rows[images])
        found[form] = rows
    return found


class Here:
    """A side in this process, asked as a `contest.Contender` is."""

    def __init__(self, spec: dict) -> None:
        self.name, self._side = spec["name"], Side(spec)

    def ask(self, method: str, **arguments):
        return getattr(self._side, method)(**arguments)

    def close(self) -> None:
        pass


def slopes(found: dict, plain: dict) -> dict:
    """MB a further image, by form and by what was counted, and its share of plain."""

    def slope(rows: dict, what: str) -> float:
        few, many = min(rows), max(rows)
        return (rows[many][what] - rows[few][what]) / (many - few)

    told = {}
    for form, rows in found.items():
        told[form] = {}
        for what in ("temporary", "host", "peak"):
            if all(what in row for row in rows.values()):
                told[form][what] = contest.significant(slope(rows, what))
                if what != "host":
                    told[form][f"{what}, of plain"] = contest.significant(slope(rows, what) / slope(plain[form], what))
    return told


def agree(found: dict, tolerance: float) -> None:
    """SystemExit when a policy has another loss or gradient norm than plain."""
    for name, forms in found.items():
        for form, rows in forms.items():
            for images, row in rows.items():
                want = found["plain"][form][images]
                for what in ("loss", "norm"):
                    if abs(row[what] / want[what] - 1) > tolerance:
                        raise SystemExit(f"{name}, {images} images {form}: {what} {row[what]}, plain {want[what]}")


def plot(told: dict) -> str:
    """A panel a form: a bar a policy, the share of the plain slope."""
    from glmv_jax.eval.report_svg import dot_panel

    wide, high = 560, 190
    parts = [
        "<style>text{font:10px sans-serif;fill:#444}.title{font-size:11px;font-weight:bold}.grid{stroke:#ddd}"
        ".mean{stroke:#222;stroke-width:2}.dot{fill:#3b6fb6}"
        "@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}.mean{stroke:#eee}}</style>"
    ]
    forms = list(told["plain"])
    for n, form in enumerate(forms):
        columns = {name: [one[form]["temporary"]] for name, one in told.items() if form in one}
        title = f"MB of temporary memory a further image takes, images {form}"
        parts += dot_panel(title, columns, wide, high, x0=n * wide)
    size = f"{wide * len(forms)} {high}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="", help="of TPUs to compile for, in place of the device that is here")
    parser.add_argument("--size", default="l", choices=SIZES)
    parser.add_argument("--patches", type=int, default=1024, help="of an image; a square of an even number")
    parser.add_argument("--images", type=int, nargs="+", default=[4, 8], help="on a device")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--forms", nargs="+", choices=["in a row", "in rows"])
    parser.add_argument("--dtype", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--time", action="store_true", help="run steps on a CPU too; on a GPU they always are")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, help="also write the JSON line there, and the drawing beside it")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contest.serve(Side, json.loads(args.contender))
    device = args.topology or contest.device(None)
    running = device == "cuda" or args.time and not args.topology
    forms = args.forms or (["in rows"] if device == "cpu" else ["in a row", "in rows"])
    spec = {"size": args.size, "patches": args.patches, "topology": args.topology,
            "dtype": args.dtype or ("float32" if device == "cpu" else "bfloat16")}  # fmt: skip
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    names = ["plain", *(name for name in args.policies if name != "plain")]
    make = (lambda s: contest.Contender(__file__, s, env)) if running else Here
    record = {"benchmark": "vision_memory", "device": device, **spec, "images": sorted(args.images),
              "MB a further image": {}, "MB": {}, **contest.environment()}  # fmt: skip
    sides = {name: make(spec | {"policy": name, "name": name}) for name in names}
    try:
        for name, side in sides.items():
            own = [form for form in forms if not POLICIES[name][2] or form == "in rows"]
            record["MB"][name] = memory_of(side, sorted(args.images), own, running)
            record["MB a further image"][name] = slopes(record["MB"][name], record["MB"]["plain"])
            keep(record, args.out)  # a run that is stopped leaves what it has found
        if running:
            agree(record["MB"], 1e-5 if spec["dtype"] == "float32" else 2e-2)
            record["ms"] = timed(sides, args.rounds)
    finally:
        for side in sides.values():
            side.close()
    record |= details(args.topology)
    keep(record, args.out)
    print(json.dumps(record))


def keep(record: dict, out: pathlib.Path | None) -> None:
    contest.save(record, out)
    if out:
        out.with_suffix(".svg").write_text(plot(record["MB a further image"]), encoding="utf-8")


def timed(sides: dict, rounds: int) -> dict:
    """Of what was started last, the most images, by policy; and against plain's."""
    for side in sides.values():
        side.ask("steps", times=2)
    runs = {name: (lambda side=side: side.ask("steps", times=3)) for name, side in sides.items()}
    turns = contest.in_turns(runs, rounds, 600)
    medians = {name: contest.spread(values) for name, values in turns.items()}
    plain = medians["plain"]["median"]
    return {name: one | {"of plain": contest.significant(one["median"] / plain)} for name, one in medians.items()}


def details(topology: str) -> dict:
    if topology:
        from importlib.metadata import version

        return {"kind": "compiled, not run", "libtpu": version("libtpu")}
    import jax

    return {"kind": str(jax.devices()[0].device_kind)}


if __name__ == "__main__":
    main()
