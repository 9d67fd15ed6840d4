"""All benchmarks that want a GPU, one after the other, their results kept: what the field is compared with there.

    python benchmarks/gpu.py [--only vlm_step muon ...] [--out benchmarks/results] [--dry]

Each is a process of its own with a time limit; one that fails is told and the others run. It needs one NVIDIA GPU of
80 GB and `pip install -e ".[cuda,hf]" torch transformers timm`; a peer that is not installed is listed as failed in its
own result. --dry prints the commands. Results are <name>_<device>.json in --out.

    vlm_step     GLM-OCR's true shapes against transformers, compiled or not: tokens/s >= 1.0, memory <= 0.8
    cogvit_step  CogViT-L against transformers' and timm's: images/s >= 1.0, half of what a matrix product reaches
    decode       GLM-OCR's text model against transformers' `generate`: tokens/s >= 3
    drafts       what the MTP head brings on a model of our recipe trained for a minute: speed-up as rates and costs say
    sigmoid      the sigmoid loss against open_clip's: the batch that fits >= 4 times
    muon         Muon on CogViT-L against optax's and torch's: time <= 0.8
    vision       memory a further image costs, with the encoder's activations on the host: <= 0.2 at <= 1.15 of the time
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from contest import device, log

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "vlm_step": "vlm_step.py --size l --batch 4 --remat none --peers hf hf-recompute hf-compiled",
    "cogvit_step": "cogvit_step.py --size l --batch 32 --remat dots --unroll 24 --peers hf-batched timm hf",
    "decode": "decode.py --size l --batch 1 8",
    "drafts": "speculative.py --drafts 1 3 --batch 1 8",
    "sigmoid": "sigmoid_loss_peers.py --devices 1 --batches 8192 32768",
    "muon": "muon.py run",
    "vision": "vision_memory.py",
}
SECONDS = 1200.0


def gpu() -> str:
    """Its name as part of a file's; "gpu" where nobody tells."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "gpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the most that one of them may take")
    parser.add_argument("--dry", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args()
    if not args.dry and device(None) != "cuda":
        parser.error("there is no NVIDIA GPU here; --dry prints what would run")
    name_of_gpu, failed = gpu(), []
    for n, name in enumerate(args.only, start=1):
        out = args.out / f"{name}_{name_of_gpu}.json"
        command = [sys.executable, *shlex.split(f"{HERE / COMMANDS[name]} --out {shlex.quote(str(out))}")]
        log(f"{n} of {len(args.only)}:", shlex.join(command))
        if args.dry:
            continue
        began = time.monotonic()
        try:
            ended = subprocess.run(command, timeout=args.seconds).returncode
        except subprocess.TimeoutExpired:
            ended = f"stopped after {args.seconds:.0f} s"
        log(f"{name}: {ended}, {time.monotonic() - began:.0f} s")
        failed += [name] * (ended != 0)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
