"""The options of each subcommand of `glmv`; what they do is in `cli`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from glmv_jax.aot import main as aot


def add(subs: Mapping[str, argparse.ArgumentParser]) -> None:
    """Gives each subcommand's parser its options."""
    for name in ("train", "sweep", "cache-teachers", "show-config", "show-batch", "shapes"):
        subs[name].add_argument("--config", required=True, metavar="FILE.py[:ARG=VALUE,FLAG]", help="the experiment")
        subs[name].epilog = "--config.KEY=VALUE, any number of times, changes one value of the config."
    subs["train"].add_argument("--workdir", required=True, metavar="DIR", help="the run's own folder, made if missing")

    sub = subs["cache-teachers"]
    sub.add_argument("--out", required=True, metavar="DIR", help="the cache, made if missing")
    sub.add_argument("--items", type=int, default=0, metavar="N", help="crops of all hosts; default: every one read")
    sub.add_argument("--hosts", type=int, default=1, metavar="N", help="hosts that the training will have (default 1)")
    sub.add_argument("--part", default="1/1", metavar="P/N", help="write only the P-th of N parts (default 1/1: all)")

    for name, source in (("import-hf", "a Hugging Face folder, or org/name on the Hub"), ("export-hf", "ours")):
        subs[name].add_argument("src", metavar="SRC", help=source)
        subs[name].add_argument("dst", metavar="DST", help="the folder to write")
        subs[name].add_argument("--dtype", metavar="NAME", help="bfloat16 or float32 (default: as stored)")

    sub = subs["generate"]
    sub.add_argument("--run", metavar="DIR", help="a recipe's run directory, as runs/quickstart")
    sub.add_argument("--checkpoint", metavar="DIR", help="a public checkpoint, imported or as it came")
    sub.add_argument("--image", action="append", nargs="+", metavar="FILE", help="pictures, in any format of Pillow")
    sub.add_argument("--prompt", metavar="TEXT", help="the question")
    sub.add_argument("--messages", metavar="FILE.json", help="a conversation, instead of --prompt")
    sub.add_argument("--token-ids", metavar="5,6,7", help="the prompt itself, instead of --prompt")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after this many (default 64)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling, when the temperature is not 0")
    sub.add_argument("--speculative", type=int, default=0, metavar="K", help="tokens the MTP head drafts a pass (0)")
    sub.add_argument("--dtype", metavar="NAME", help="of a checkpoint: bfloat16 or float32 (default: as stored)")
    sub.add_argument("--json", action="store_true", help="of a checkpoint: token ids and log-probabilities as JSON")

    subs["show-batch"].add_argument("--step", type=int, default=1, metavar="N", help="of which step (default 1)")
    subs["show-batch"].add_argument("--html", metavar="FILE", help="write a page instead of printing")

    sub = subs["shapes"]
    sub.add_argument("--devices", type=int, default=0, metavar="N", help="of the mesh (default: as its sizes multiply)")
    sub.add_argument("--biggest", action="store_true", help="largest first (default: by path)")
    sub.add_argument("--limit-mb", type=float, default=64.0, metavar="MB", help="on a device: larger is large (64)")
    sub.add_argument("--allow-replicated", action="append", metavar="REGEX", help="what may be whole; repeatable")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all of it as JSON: to a file, or printed")

    _sweep_options(subs["sweep"])
    _vocabulary_options(subs["train-vocabulary"])
    _eval_options(subs["eval"])
    aot.options(subs["compile"])
    subs["report"].add_argument("--run", default="runs/quickstart", metavar="DIR", help="default: runs/quickstart")


def _eval_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", required=True, metavar="DIR", help="a stage's work directory")
    sub.add_argument("--suite", metavar="ROOT", help="a folder of data sets")
    sub.add_argument("--datasets", nargs="+", metavar="NAME", help="only these of them (default: all that are there)")
    measures = sub.add_argument_group("measures (default: those that need no fitting)")
    measures.add_argument("--zeroshot", action="store_true", help="class names as sentences: accuracy, or mAP")
    measures.add_argument("--retrieval", action="store_true", help="R@1, 5, 10, from texts to images and back")
    measures.add_argument("--knn", action="store_true", help="nearest neighbours of the trunk in the split train")
    measures.add_argument("--linear-probe", action="store_true", help="logistic regression on the trunk, L2 searched")
    how = sub.add_argument_group("how")
    how.add_argument("--templates", metavar="SET", help="own (default: each data set's), clip_80, zh, plain or a file")
    how.add_argument("--classnames", metavar="FILE", help="class names, one a line or JSON (default: each data set's)")
    how.add_argument("--k", type=int, metavar="N", help="neighbours (default 20)")
    how.add_argument("--seed", type=int, metavar="N", help="of the linear probe's validation rows (default 0)")
    how.add_argument("--limit", type=int, metavar="N", help="N samples of a split, spread over it: for a quick look")
    how.add_argument("--patches", type=int, metavar="N", help="of a picture at most (default: as in the run's config)")
    how.add_argument("--batch", type=int, metavar="N", help="rows at a time over all devices (default 256)")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the report as JSON: to a file, or printed")


def _sweep_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's own folder, made if missing")
    sub.add_argument("--set", action="append", metavar="KEY=V,V", help="values of a config key; any number of times")
    sub.add_argument("--seeds", metavar="0..4", help="seeds, as 0..4 or 0,1,5 (default: the config's own)")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1; with TPUs always 1)")
    sub.add_argument("--dry-run", action="store_true", help="only say which runs there are and what they would do")


def _vocabulary_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text", action="append", metavar="PATH", help="a file or folder of texts; any number of times")
    sub.add_argument("--field", default="", metavar="NAME", help="where the texts of a table or .jsonl stand")
    sub.add_argument("--size", type=int, metavar="N", help="pieces (default 64000; of the shipped corpus 4096)")
    sub.add_argument("--limit-mb", type=float, default=64.0, metavar="MB", help="text trained on (default 64)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    sub.add_argument("--out", required=True, metavar="FILE", help="the sentencepiece model to write")
