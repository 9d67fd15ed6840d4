"""`glmv train`, `sweep`, and what is made before training: `cache-teachers`, `train-vocabulary`."""

from __future__ import annotations

import argparse
import contextlib
import os

from glmv_jax.cli.common import config_options, read_config
from glmv_jax.parallel import multihost
from glmv_jax.typing import UserError


def train(args: argparse.Namespace) -> int:
    """Runs or resumes one stage.

    A run is one experiment file and one work directory. Called again with the same two it goes on from the last
    checkpoint, or says that the stage is finished.

      glmv train --config experiments/cogvit_mim.py:size=nano --workdir runs/mim
      glmv train --config experiments/vlm_sft.py:size=nano --workdir runs/sft \\
          --config.init_from=runs/pretrain --config.optim.lr=3e-4

    What follows the colon are the file's own arguments; --config.KEY=VALUE changes any value of the config
    (`glmv show-config` lists them). A misspelt name stops at once and names the nearest.

    Ctrl-C or SIGTERM: the step ends, a checkpoint is written, and the exit code is 130, or 0 after SIGTERM. For a
    supervisor that starts again only what failed, choose another one for SIGTERM: --on-term 143.

    On the machines of a TPU slice, in GKE and under SLURM the same command on each of them is one run. --profile 10:14
    writes a trace of those steps into the work directory, and says what they spent their time on.
    """
    from glmv_jax.train import workdir as folders

    cfg = read_config(args)
    workdir = os.path.abspath(args.workdir)
    folders.check(workdir, cfg.get("stage"))
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made ({error.strerror}); give another folder") from None
    with folders.alone_in(workdir) if multihost.is_first() else contextlib.nullcontext():
        from glmv_jax.train import main as train_main
        from glmv_jax.train.signals import Interrupted

        try:
            train_main.run(cfg, workdir, args.profile)
        except Interrupted as stopped:
            return int(stopped.code or args.on_term)
    return 0


def train_options(sub: argparse.ArgumentParser) -> None:
    config_options(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run's own folder, made if missing")
    sub.add_argument("--profile", metavar="FIRST:LAST", help="steps to trace, both of them included")
    sub.add_argument("--on-term", type=int, default=0, metavar="CODE", help="exit code after SIGTERM (0)")
    multihost.options(sub)


def sweep(args: argparse.Namespace) -> int:
    """Trains a config with every combination of some values and seeds, each run in a process of its own.

    Stop it whenever you like: the same command goes on, finished runs are passed over, a run that fails ends no other
    one. At the end a table, report.html with means and intervals over seeds, and all of it in sweep.json.

      glmv sweep --config experiments/mmtp_ablation.py:size=nano --workdir runs/mmtp --seeds 0..4 \\
          --set model.mtp.option=embeddings,masked,image_token
      glmv sweep --config experiments/vlm_sft.py:size=nano --workdir runs/rates --config.steps=50 \\
          --set optim.lr=1e-3,4e-3 --set batch=8,16 --dry-run

    Further seeds or values may follow in further calls; the report is of all of them. Exit code 1 when a run failed: it
    is named with its last words, and the same command tries it again. --jobs shares GPUs out evenly; with --jobs 2 on
    one GPU, where the first process would take most of the memory, set XLA_PYTHON_CLIENT_MEM_FRACTION=.45 before.

    On other machines every run has its own, by launch/tpu_vm.sh or as a JobSet made from launch/gke_jobset.yaml: asked
    for, looked after, given back at its end. They get the commit that is checked out, and paths in the config are
    theirs. A slice that is taken away is asked for again, and the run goes on from its last checkpoint in the bucket.
    Ctrl-C only stops looking. --dry-run prints every command; for gke it is YAML that kubectl can check:

      glmv sweep --config experiments/vlm_pretrain.py:size=l --workdir runs/pods --launcher tpu_vm --type v5p-128 \\
          --set optim.lr=1e-4,3e-4 --set seed=0..2
      glmv sweep ... --launcher gke --dry-run | kubectl apply --dry-run=server -f -
    """
    cfg = read_config(args)
    from pathlib import Path

    from glmv_jax.train.sweep import launchers
    from glmv_jax.train.sweep import main as sweep_main
    from glmv_jax.train.sweep.plan import Shared, plan
    from glmv_jax.train.workdir import alone_in

    workdir, runs = Path(args.workdir).absolute(), plan(cfg, args.set or (), args.seeds)
    shared = Shared(args.config, tuple(args.overrides), workdir, args.jobs)
    options = {name: getattr(args, name) for name in _REMOTE}
    launcher = launchers.make(args.launcher, shared, sweep_main.identity(workdir), options)
    sweep_main.check(workdir, cfg, launcher)
    if args.dry_run:
        print(*sweep_main.dry_run(runs, launcher), sep="\n")
        return 0
    os.makedirs(workdir, exist_ok=True)
    with alone_in(str(workdir)):
        return sweep_main.run(cfg, runs, launcher)


_REMOTE = ("type", "slices", "jobset", "results", "every")  # of `glmv sweep`, by the names of their attributes


def sweep_options(sub: argparse.ArgumentParser) -> None:
    config_options(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's own folder, made if missing")
    sub.add_argument("--set", action="append", metavar="KEY=V,V", help="values of a config key; repeatable")
    sub.add_argument("--seeds", metavar="0..4", help="seeds, as 0..4 or 0,1,5 (default: the config's own)")
    sub.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: here 1, elsewhere all; TPUs: 1)")
    sub.add_argument("--dry-run", action="store_true", help="only say which runs there are and what they would do")
    there = sub.add_argument_group("other machines")
    there.add_argument("--launcher", default="local", choices=("local", "tpu_vm", "gke"), help="where runs run (local)")
    there.add_argument("--type", metavar="TYPE", help="tpu_vm: accelerator type of a run, as v5p-128")
    there.add_argument("--slices", type=int, metavar="N", help="tpu_vm: slices of that type for a run (default 1)")
    there.add_argument("--jobset", metavar="FILE", help="gke: what runs are made from (default launch/gke_jobset.yaml)")
    there.add_argument("--results", metavar="DIR", help="where the bucket is mounted here (default: by gcloud storage)")
    there.add_argument("--every", type=float, metavar="SECONDS", help="between looks at a run (default 30)")


def cache_teachers(args: argparse.Namespace) -> int:
    """Writes what the teachers of stage 1 see, for training to read instead of running them.

    Called again with the same values it goes on where it stopped. Several machines can write at once, a part each.

      glmv cache-teachers --config experiments/cogvit_mim.py:size=l --out features --items 1000000 --hosts 4 \\
          --part 1/4 --config.teachers.semantic.path=siglip2-so400m-patch14-224 --config.data.sources.natural=photos/
      glmv train --config experiments/cogvit_mim.py:size=l --workdir runs/mim --config.data.teacher_cache=features \\
          --config.data.sources.natural=photos/

    Crops, seed, sources and teachers have to be those of the training, which refuses any other cache. Beyond --items
    the training sees the same crops again, with other masks.
    """
    cfg = read_config(args)
    from glmv_jax.train import teacher_cache
    from glmv_jax.train.checkpoint import quiet_orbax

    quiet_orbax()
    part = tuple(int(n) if n.isdecimal() else 0 for n in args.part.split("/"))
    if len(part) != 2:
        raise UserError(f"--part {args.part} is not P/N; give for example 1/4")
    teacher_cache.write(cfg, args.out, items=args.items, hosts=args.hosts, part=part)
    return 0


def cache_teachers_options(sub: argparse.ArgumentParser) -> None:
    config_options(sub)
    sub.add_argument("--out", required=True, metavar="DIR", help="the cache, made if missing")
    sub.add_argument("--items", type=int, default=0, metavar="N", help="crops of all hosts; default: every one read")
    sub.add_argument("--hosts", type=int, default=1, metavar="N", help="hosts that the training will have (default 1)")
    sub.add_argument("--part", default="1/1", metavar="P/N", help="write only the P-th of N parts (default 1/1: all)")


def train_vocabulary(args: argparse.Namespace) -> int:
    """Trains a sentencepiece vocabulary on texts in Chinese and English, both of the same weight.

    Without --text on the shipped corpus. Files may be .txt, .jsonl, .tsv, .csv, each also as .gz; folders are searched
    for them. They are read once, a sample of them is trained on, and texts held out tell how many tokens they cost.

      glmv train-vocabulary --text captions.jsonl --text wiki/ --size 64000 --out vocab.model
      glmv train --config experiments/cogvit_siglip.py:size=l --config.data.vocabulary=vocab.model ...
    """
    from glmv_jax.data import text_files, vocabulary_training
    from glmv_jax.data.corpus import build_vocab

    if args.text:
        texts, size = text_files.Texts(args.text, args.field), args.size or vocabulary_training.PIECES
        told = vocabulary_training.run(texts, args.out, size, round(args.limit_mb * 1e6), args.seed)
        told.insert(0, f"{texts.skipped} records without a text that could be read")
    else:
        size = args.size or build_vocab.PIECES
        model = build_vocab.model(size)
        vocabulary_training.write(model, args.out)
        told = vocabulary_training.report(model, build_vocab.heldout_lines())
    print(*told, f"{args.out}: {size} pieces; --config.data.vocabulary={args.out} --config.model.text.vocab={size}",
          sep="\n")  # fmt: skip
    return 0


def train_vocabulary_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text", action="append", metavar="PATH", help="a file or folder of texts; any number of times")
    sub.add_argument("--field", default="", metavar="NAME", help="where the texts of a table or .jsonl stand")
    sub.add_argument("--size", type=int, metavar="N", help="pieces (default 64000; of the shipped corpus 4096)")
    sub.add_argument("--limit-mb", type=float, default=64.0, metavar="MB", help="text trained on (default 64)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    sub.add_argument("--out", required=True, metavar="FILE", help="the sentencepiece model to write")
