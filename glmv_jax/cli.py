"""The `glmv` command: thin, one function a subcommand, heavy modules imported only where they are used.

What a person can mend (`UserError`, a full disk, a folder that may not be written) is one line on stderr and exit code
2; Ctrl-C is 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterable

from glmv_jax import __version__, cli_options
from glmv_jax.typing import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of the command."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code (0 good, 1 a check failed, 2 wrong input, 130 Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = f"glmv {argv[0]}" if argv and argv[0] in _COMMANDS else "glmv"
    try:
        return _run(argv)
    except UserError as error:
        return _complain(name, " ".join(str(error).split()))
    except BrokenPipeError:  # `glmv doctor | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        return _complain(name, f"{error.strerror}: {error.filename or 'disk'}; free space or choose another folder")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _complain(name: str, message: str) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
    parser, options = _parser()
    if not argv:
        parser.print_help()
        return 0
    command, rest = argv[0], argv[1:]
    if command not in (*_COMMANDS, "-h", "--help", "--version"):
        raise UserError(f"no command {command!r}{_nearest(command, _COMMANDS)}")

    overrides = [arg.removeprefix("--config.") for arg in rest if arg.startswith("--config.")]
    rest = [arg for arg in rest if not arg.startswith("--config.")]
    known = options.get(command, ["--help", "--version"])
    for arg in rest:  # before argparse, which would rather complain of what a misspelt option leaves missing
        option = arg.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise UserError(f"unknown option {option!r}{_nearest(option, known)}")
    if overrides and "--config" not in known:
        raise UserError(f"this command takes no config, so no --config.{overrides[0]}")
    args = parser.parse_args([command, *rest])
    args.overrides = overrides
    return args.function(args)


def _nearest(word: str, known: Iterable[str]) -> str:
    from glmv_jax.config import nearest

    return nearest(word, known)


# --- subcommands ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Runs or resumes one stage.

    A run is one experiment file and one work directory. Called again with the same two it goes on from the last
    checkpoint, or says that the stage is finished.

      glmv train --config experiments/cogvit_mim.py:size=nano --workdir runs/mim
      glmv train --config experiments/vlm_sft.py:size=nano --workdir runs/sft \\
          --config.init_from=runs/pretrain --config.optim.lr=3e-4

    What follows the colon are the file's own arguments; --config.KEY=VALUE changes any value of the config
    (`glmv show-config` lists them). A misspelt name stops at once and names the nearest.
    """
    cfg = _config(args)
    workdir = os.path.abspath(args.workdir)
    _check_workdir(workdir, cfg)
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be made ({error.strerror}); give another folder") from None
    with _alone_in(workdir):
        from glmv_jax.train import main as train_main

        train_main.run(cfg, workdir)
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Trains a config with every combination of some values and seeds, each run in a process of its own.

    Stop it whenever you like: the same command goes on, finished runs are passed over, a run that fails ends no other
    one. At the end a table, report.html with means and intervals over seeds, and all of it in sweep.json.

      glmv sweep --config experiments/mmtp_ablation.py:size=nano --workdir runs/mmtp --seeds 0..4 \\
          --set model.mtp.option=embeddings,masked,image_token
      glmv sweep --config experiments/vlm_sft.py:size=nano --workdir runs/rates --config.steps=50 \\
          --set optim.lr=1e-3,4e-3 --set batch=8,16 --dry-run

    Further seeds or values may follow in further calls; the report is of all of them. Exit code 1 when a run failed: it
    is named with its last words, and the same command tries it again. With --jobs 2 on one GPU, where the first process
    would take most of the memory, set XLA_PYTHON_CLIENT_MEM_FRACTION=.45 before.
    """
    cfg = _config(args)
    from pathlib import Path

    from glmv_jax.train.sweep import main as sweep_main
    from glmv_jax.train.sweep.plan import plan

    workdir, runs = Path(args.workdir).absolute(), plan(cfg, args.set or (), args.seeds)
    sweep_main.check(workdir, cfg, args.jobs)
    if args.dry_run:
        print(*sweep_main.dry_run(args.config, args.overrides, runs, workdir), sep="\n")
        return 0
    os.makedirs(workdir, exist_ok=True)
    with _alone_in(str(workdir)):
        return sweep_main.run(args.config, cfg, args.overrides, runs, workdir, args.jobs)


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
    cfg = _config(args)
    from glmv_jax.train import teacher_cache
    from glmv_jax.train.checkpoint import quiet_orbax

    quiet_orbax()
    part = tuple(int(n) if n.isdecimal() else 0 for n in args.part.split("/"))
    if len(part) != 2:
        raise UserError(f"--part {args.part} is not P/N; give for example 1/4")
    teacher_cache.write(cfg, args.out, items=args.items, hosts=args.hosts, part=part)
    return 0


def import_hf(args: argparse.Namespace) -> int:
    """Reads a public checkpoint into a folder that training can start from and `glmv generate` can read.

    SRC is a folder in Hugging Face layout (config.json, safetensors), or its name on the Hub. DST must not exist yet.

      glmv import-hf GLM-OCR/ checkpoints/glm-ocr
      glmv import-hf zai-org/GLM-OCR checkpoints/glm-ocr --dtype bfloat16
      glmv train --config experiments/vlm_sft.py:size=l --workdir runs/sft --config.init_from=checkpoints/glm-ocr

    One tensor at a time is in memory. The tokenizer, the chat template and every other small file are kept.
    """
    from glmv_jax.train import checkpoint, exchange

    checkpoint.quiet_orbax()
    print(exchange.import_hf(args.src, args.dst, args.dtype))
    return 0


def export_hf(args: argparse.Namespace) -> int:
    """Gives a checkpoint back in Hugging Face layout, complete for transformers' from_pretrained.

    SRC is a folder that `glmv import-hf` wrote, or the work directory of a run that began from one. DST must not exist.

      glmv export-hf checkpoints/glm-ocr GLM-OCR-again/
      glmv export-hf runs/sft GLM-OCR-mine/ --dtype bfloat16
    """
    from glmv_jax.train import checkpoint, exchange

    checkpoint.quiet_orbax()
    print(exchange.export_hf(args.src, args.dst, args.dtype))
    return 0


def generate(args: argparse.Namespace) -> int:
    """Answers a prompt, with or without images: with the last finished stage of a recipe, or a public checkpoint.

    Examples:

      glmv generate --run runs/quickstart --image page.png --prompt "What does it say?"
      glmv generate --run runs/quickstart --image cats.png --prompt "图中有几只猫？" --temperature 0.7 --seed 3

    --checkpoint takes what `glmv import-hf` wrote, a run that began from it, or a folder in Hugging Face layout. The
    prompt is a question, a file of messages as the OpenAI API has them, or token ids; an image for each placeholder:

      glmv generate --checkpoint checkpoints/glm-ocr --image page.png --prompt "Text Recognition:"
      glmv generate --checkpoint checkpoints/glm-ocr --messages chat.json --image a.png b.png --json
      glmv generate --checkpoint checkpoints/glm-ocr --token-ids 5,6,7 --max-new-tokens 8 --json
    """
    from glmv_jax.inference.generate import generate_from_run
    from glmv_jax.train.checkpoint import quiet_orbax

    quiet_orbax()
    if (args.run is None) == (args.checkpoint is None):
        raise UserError("give either --run or --checkpoint; see glmv generate --help")
    images = [file for files in args.image or () for file in files]
    settings = dict(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed, drafts=args.speculative
    )
    if args.checkpoint is not None:
        return _generate_from_checkpoint(args, images, settings)
    if args.prompt is None:
        raise UserError("with --run this is required: --prompt; see glmv generate --help")
    if given := [name for name in ("messages", "token_ids", "json") if getattr(args, name)]:
        raise UserError(f"--{given[0].replace('_', '-')} goes with --checkpoint, not with --run")
    if len(images) > 1:
        raise UserError("with --run a question is about one picture; give one --image")
    print(generate_from_run(args.run, _answering_model, images[0] if images else None, args.prompt, **settings))
    return 0


def _generate_from_checkpoint(args: argparse.Namespace, images: list[str], settings: dict) -> int:
    from glmv_jax.data.processor import Processor, question, read_messages
    from glmv_jax.inference import public
    from glmv_jax.train import exchange

    if sum(given is not None for given in (args.prompt, args.messages, args.token_ids)) != 1:
        raise UserError("with --checkpoint give one of --prompt, --messages, --token-ids")
    processor = Processor(exchange.files(args.checkpoint))  # the prompt first: weights may take long
    if args.token_ids is not None:
        try:
            ids = [int(word) for word in args.token_ids.replace(",", " ").split()]
        except ValueError:
            raise UserError(f"--token-ids {args.token_ids} are no numbers; give for example 5,6,7") from None
        prompt = processor.document(ids, images)
    else:
        asked = question(args.prompt, len(images)) if args.messages is None else read_messages(args.messages)
        prompt = processor.conversation(asked, images)
    public.check_length(processor, prompt, settings["max_new_tokens"])
    cfg, params = exchange.load(args.checkpoint, args.dtype)
    answer = public.reply(cfg, params, processor, prompt, **settings)
    print(public.as_json(answer, processor) if args.json else public.as_text(answer, processor))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates a trained stage: on its own held-out data, or a vision encoder on data sets in a folder.

    Without --suite: the numbers that training printed last, one a line. Example:

      glmv eval --run runs/quickstart/sft

    With --suite, for a run of stage mim or siglip: ROOT holds data sets as CLIP benchmark and DataComp write them
    (DATASET/test/0.tar ..., classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt). Each is
    evaluated as what it is; without a choice of measures those that need no fitting (stage siglip: --zeroshot
    --retrieval, stage mim: --knn). The average over the 38 tasks of DataComp is printed only when all are there.

      glmv eval --run runs/siglip --suite /data/clip --json results.json
      glmv eval --run runs/siglip --suite /data/clip --datasets imagenet1k --templates zh --classnames cn.json
      glmv eval --run runs/mim --suite /data/clip --datasets imagenet1k cars --knn --linear-probe

    Exit code 1 when a data set that is there could not be evaluated.
    """
    if not os.path.isfile(os.path.join(args.run, "config.json")):
        raise UserError(f"{args.run} is no work directory of a stage (it has no config.json); give one, as RUN/sft")
    run = os.path.abspath(args.run)
    if args.suite is None:
        if given := [name for name in _SUITE_OPTIONS if getattr(args, name) not in (None, False, [])]:
            raise UserError(f"--{given[0].replace('_', '-')} is about data sets; name their folder with --suite ROOT")
        from glmv_jax.train import main as train_main

        numbers = train_main.evaluate(run)
        _write_json(args.json, numbers)
        for name, value in sorted(numbers.items()):
            print(f"{name:<40} {value:.4f}", file=sys.stderr if args.json == "-" else sys.stdout)
        return 0
    return _evaluate_suite(run, args)


# Of `glmv eval`, by the names of their attributes: what means nothing without --suite.
_MEASURES = ("zeroshot", "retrieval", "knn", "linear_probe")
_SUITE_OPTIONS = (*_MEASURES, "datasets", "templates", "classnames", "k", "limit", "patches", "batch", "seed")


def _evaluate_suite(run: str, args: argparse.Namespace) -> int:
    from glmv_jax.eval import summary
    from glmv_jax.train import main as train_main

    chosen = {
        "measures": tuple(name.replace("_", "-") for name in _MEASURES if getattr(args, name)),
        "templates": args.templates, "classnames": args.classnames, "k": args.k, "seed": args.seed,
    }  # fmt: skip
    settings = {name: value for name, value in chosen.items() if value not in (None, ())}
    sizes = {n: getattr(args, n) for n in ("limit", "patches", "batch") if getattr(args, n) is not None}
    if wrong := [name for name, value in (settings | sizes).items() if isinstance(value, int) and value < 0]:
        raise UserError(f"--{wrong[0]} is negative; give a number from 0 on")

    def say(name: str, result: dict) -> None:
        found = result.get("failed") or f"{result['main']} {result['score']:.4f} in {result['seconds']} s"
        print(f"{name}: {found}", file=sys.stderr, flush=True)

    report = train_main.evaluate_data(run, args.suite, args.datasets or (), settings, say=say, **sizes)
    _write_json(args.json, report)
    print("\n".join(summary.lines(report)), file=sys.stderr if args.json == "-" else sys.stdout)
    return 1 if report["failed"] else 0


def _write_json(target: str | None, content: dict) -> None:
    """Into a file, or "-": standard output; nothing without a target."""
    import json

    if target is None:
        return
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if target == "-":
        print(text)
        return
    with open(target, "w", encoding="utf-8") as file:
        file.write(text + "\n")


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


def report(args: argparse.Namespace) -> int:
    """Prints the final table of a recipe, or of a sweep, and writes report.html beside its stages or runs.

      glmv report --run runs/quickstart
      glmv report --run runs/mmtp

    The page is one self-contained file. What has not run is named as such, so it may be made at any time.
    """
    from glmv_jax.eval import report as eval_report

    path = eval_report.write(args.run)
    eval_report.show(args.run)
    print(f"report: {path}")
    return 0


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

    for key, value in config.flat(_config(args)).items():
        print(f"{key} = {value!r}")
    return 0


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
    report = lib.run(_config(args), args.devices, console=Console(stderr=args.json == "-"), **settings)
    _write_json(args.json, report)
    if report["refusal"]:
        raise UserError(report["refusal"])
    return 0


def show_batch(args: argparse.Namespace) -> int:
    """Shows what a batch of stages 3 to 5 really holds: text coloured by loss weight, pictures, what rows have left.

    All of it is read back from the arrays that the model is given. With --html as a page, pictures and boxes drawn.

      glmv show-batch --config experiments/vlm_pretrain.py:size=nano
      glmv show-batch --config experiments/vlm_sft.py:size=nano --step 3 --html batch.html
    """
    from glmv_jax.train import show

    show.show_batch(_config(args), args.step, args.html)
    return 0


# --- helpers ----------------------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace):
    from glmv_jax import config

    return config.override(config.load(args.config), args.overrides)


def _answering_model(folder):
    """The model of a finished stage's work directory, with the tokenizer and image sizes that it was trained with."""
    from glmv_jax.data.naflex import Patcher
    from glmv_jax.data.tokenizer import open_tokenizer
    from glmv_jax.inference.generate import Model
    from glmv_jax.models import build
    from glmv_jax.train import checkpoint, weights

    cfg = checkpoint.load_config(folder)
    model = build.vlm(cfg.model)
    vision = model.vision
    sizes = dict(max_patches=cfg.data.image_patches, policy=cfg.data.get("sizing", "naflex"))
    patcher = Patcher(patch=vision.patch, temporal=vision.temporal_patch, **sizes)
    tokenizer = open_tokenizer(cfg.data.vocabulary or None)
    return Model(model, weights.load(folder), tokenizer, patcher, chat=cfg.stage != "pretrain")


def _check_workdir(workdir: str, cfg) -> None:
    """Refuses a work directory that is a file, or that holds a run of another stage."""
    import json

    if os.path.lexists(workdir) and not os.path.isdir(workdir):
        raise UserError(f"--workdir {workdir} is a file; give a folder")
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file).get("stage")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or give another --workdir") from None
    if before != cfg.get("stage"):
        raise UserError(
            f"--workdir {workdir} holds a run of stage {before!r}, but the config is of stage {cfg.get('stage')!r}; "
            "give another --workdir"
        )


@contextlib.contextmanager
def _alone_in(workdir: str):
    """Holds the work directory's lock; waits while another process (say, of a killed quickstart) is training there.

    The lock is a record lock: it ends with its process, however that dies, and worker processes do not inherit it.
    """
    import fcntl

    with open(os.path.join(workdir, ".lock"), "a+", encoding="ascii") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "?"
            print(f"waiting: process {holder} is training in {workdir} (Ctrl-C to give up)", flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


_COMMANDS = {
    "train": train,
    "sweep": sweep,
    "cache-teachers": cache_teachers,
    "import-hf": import_hf,
    "export-hf": export_hf,
    "generate": generate,
    "eval": evaluate,
    "train-vocabulary": train_vocabulary,
    "report": report,
    "compile": compile_for,
    "doctor": doctor,
    "show-config": show_config,
    "show-batch": show_batch,
    "shapes": shapes,
}

_DESCRIPTION = """GLM-5V-Turbo in JAX: mim -> siglip -> pretrain -> sft -> rl, one recipe.

  glmv doctor                                          what this machine has and lacks
  glmv train --config experiments/vlm_sft.py:size=nano --workdir runs/sft
  glmv import-hf GLM-OCR/ checkpoints/glm-ocr          a public checkpoint, to train on or to answer
  glmv report --run runs/quickstart                    the table and report.html
  glmv COMMAND --help                                  each command, with examples
"""


def _parser() -> tuple[argparse.ArgumentParser, dict[str, list[str]]]:
    """The parser, and the options that each command knows."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="glmv", description=_DESCRIPTION, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"glmv_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    subs = {}
    for name, function in _COMMANDS.items():
        first, _, rest = function.__doc__.partition("\n")
        rest = "\n".join(line.removeprefix("    ") for line in rest.splitlines()).rstrip()
        subs[name] = commands.add_parser(
            name, help=first, description=f"{first}\n{rest}", formatter_class=form, allow_abbrev=False
        )
        subs[name].set_defaults(function=function)

    cli_options.add(subs)
    options = {name: list(sub._option_string_actions) for name, sub in subs.items()}
    return parser, options


if __name__ == "__main__":
    sys.exit(main())
