"""`glmv compile`, `doctor`, `shapes`, `tasks`, `show-config`, `show-data`, `show-batch`: what a machine has, what a run
would be."""

from __future__ import annotations

import argparse

from glmv_jax.cli.common import config_options, read_config, write_json
from glmv_jax.typing import UserError


def compile_for(args: argparse.Namespace) -> int:
    """Compiles a run for TPUs that are not there, and says whether it fits and what it costs.

    Runs on any x86 Linux with libtpu (the extra tpu). The numbers are the compiler's estimates; nothing is measured.

      glmv compile --config experiments/cogvit_siglip.py:size=l --topology v5p:8x8x8 --json siglip.json
      glmv compile --config experiments/vlm_pretrain.py:size=l --topology v5e:16x16 --xla async --html page.html
      glmv compile --compare before.json after.json

    Exit code 1 when the program does not fit the memory of a device.
    """
    from glmv_jax.aot import main as aot

    return aot.run(args)


def doctor(args: argparse.Namespace) -> int:
    """Says what this machine has (devices, memory, extras) and how to install what is missing.

      glmv doctor

    Exit code 0 when glmv_jax can work here, 1 when something that it needs is broken.
    """
    from glmv_jax import doctor as checks

    return checks.main()


def show_config(args: argparse.Namespace) -> int:
    """Prints every value of a config, after the file's arguments and the overrides.

    Example:

      glmv show-config --config experiments/vlm_sft.py:size=nano --config.optim.lr=3e-4
    """
    from glmv_jax import config

    for key, value in config.flat(read_config(args)).items():
        print(f"{key} = {value!r}")
    return 0


show_config_options = config_options


def shapes(args: argparse.Namespace) -> int:
    """Prints where every parameter and its optimiser state would live, and what that takes on a device.

    Nothing is allocated, and the devices need not be here: a laptop tells about a pod.

      glmv shapes --config experiments/glm5v_pretrain.py:size=l --devices 512 --biggest
      glmv shapes --config experiments/vlm_sft.py:size=l --config.mesh.fsdp=16 --config.mesh.tensor=4 \\
          --config.rules=fsdp_tensor --json shapes.json

    Exit code 2 for a layout that keeps a large array whole on devices which could share it: the line names the array,
    the axis, and rules that split it. --limit-mb says what is large, --allow-replicated what may be so.
    """
    from rich.console import Console

    from glmv_jax.train import shapes as lib

    settings = dict(biggest=args.biggest, limit=round(args.limit_mb * 2**20), allowed=args.allow_replicated or ())
    report = lib.run(read_config(args), args.devices, console=Console(stderr=args.json == "-"), **settings)
    write_json(args.json, report)
    if report["refusal"]:
        raise UserError(report["refusal"])
    return 0


def shapes_options(sub: argparse.ArgumentParser) -> None:
    config_options(sub)
    sub.add_argument("--devices", type=int, default=0, metavar="N", help="of the mesh (default: as its sizes multiply)")
    sub.add_argument("--biggest", action="store_true", help="largest first (default: by path)")
    sub.add_argument("--limit-mb", type=float, default=64.0, metavar="MB", help="on a device: larger is large (64)")
    sub.add_argument("--allow-replicated", action="append", metavar="REGEX", help="what may be whole; repeatable")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all of it as JSON: to a file, or printed")


def show_data(args: argparse.Namespace) -> int:
    """Shows what the sources of any stage give, before it is packed or batched: how much, how large, what is skipped.

    For each source: its share, wanted and drawn; records that are broken or left out, with the reasons; the sizes of
    texts and pictures; and examples with their pictures, as the model will see them. Broken records end nothing, and
    nothing is written but the page. Items are those that training would draw, in its order; with a source that has an
    end, draws beyond its records are of its next epoch.

      glmv show-data --config experiments/vlm_pretrain.py:size=nano
      glmv show-data --config experiments/vlm_sft.py:size=nano,sources=mine --config.data.sources.mine.path=mine/ \\
          --config.data.sources.mine.prompt="What is it?" --html data.html
      glmv show-data --config experiments/cogvit_siglip.py:size=l,sources=web --draws 2000 --examples 6 \\
          --config.data.sources.web.path='web-{000..127}.tar' --html data.html

    Exit code 1 when a source gave nothing at all. What rows and batches then hold is shown by glmv show-batch.
    """
    from glmv_jax.train import show_data as lib

    tallies = lib.show_data(read_config(args), args.draws, args.examples, args.html)
    return 1 if any(tally.turns and not tally.drawn for tally in tallies) else 0


def show_data_options(sub: argparse.ArgumentParser) -> None:
    config_options(sub)
    sub.add_argument("--draws", type=int, default=256, metavar="N", help="items drawn, of all sources (default 256)")
    sub.add_argument("--examples", type=int, default=2, metavar="N", help="shown of each source (default 2)")
    sub.add_argument("--html", metavar="FILE", help="write a page instead of printing")


def show_batch(args: argparse.Namespace) -> int:
    """Shows what a batch of stages 3 to 5 really holds: text coloured by loss weight, pictures, what rows have left.

    All of it is read back from the arrays that the model is given. With --html as a page, pictures and boxes drawn.

      glmv show-batch --config experiments/vlm_pretrain.py:size=nano
      glmv show-batch --config experiments/vlm_sft.py:size=nano --step 3 --html batch.html
    """
    from glmv_jax.train import show

    show.show_batch(read_config(args), args.step, args.html)
    return 0


def show_batch_options(sub: argparse.ArgumentParser) -> None:
    config_options(sub)
    sub.add_argument("--step", type=int, default=1, metavar="N", help="of which step (default 1)")
    sub.add_argument("--html", metavar="FILE", help="write a page instead of printing")


def tasks(args: argparse.Namespace) -> int:
    """Lists the tasks of reinforcement learning: picture, prompt, gold answer, what it earns and what cheating earns.

      glmv tasks
      glmv tasks --task tabular --count 3 --seed 1
      glmv tasks --html tasks.html --count 6 --split heldout

    Without --task a line for each, of its first sample. Exit code 1 when a gold answer is not paid in full, or a wrong
    one more than half.
    """
    from rich.console import Console

    from glmv_jax.rl import showing
    from glmv_jax.rl import tasks as lib

    if args.count < 1:
        raise UserError(f"--count {args.count} shows nothing; give 1 or more")
    chosen = [lib.get(name) for name in args.task or lib.TASKS]
    if args.html is None and args.task is None:
        return 0 if showing.overview(chosen, Console(), args.split, args.seed) else 1
    found: list = []
    for task in chosen:
        try:
            found.append((task, showing.examples(task, args.count, args.split, args.seed)))
        except UserError as error:
            if args.task:
                raise
            found.append((task, str(error)))
    if args.html is None:
        for task, samples in found:
            showing.detailed(task, samples, Console())
    else:
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(showing.page(found, f"{len(found)} tasks, {args.split}, seed {args.seed}"))
        print(f"{len(found)} tasks in {args.html}")
    return 0 if all(example.sound for _, some in found for example in some if not isinstance(some, str)) else 1


def tasks_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", action="append", metavar="NAME", help="samples of this task; repeatable (default: all)")
    sub.add_argument("--count", type=int, default=4, metavar="N", help="samples of each (default 4)")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="other samples (default 0)")
    sub.add_argument("--split", default="train", metavar="NAME", help="train (default) or heldout")
    sub.add_argument("--html", metavar="PAGE", help="write a page instead of printing")
