"""Stage 2: CogViT and a text tower under the sigmoid loss, on images of native size and aspect ratio.

    glmv train --config experiments/cogvit_siglip.py:size=nano --workdir runs/siglip --config.init_from=runs/mim
    glmv train --config experiments/cogvit_siglip.py:size=nano,role=teacher --workdir runs/teacher
    glmv eval --run runs/siglip --suite /data/clip

size=nano: two CPU cores, about five minutes, 1,651 emoji in Chinese and English, 180 concepts held out,
           and single shapes and symbols for a quarter of the pairs. Held-out R@5 .22 to .26 (chance .028), three seeds.
role=teacher: a smaller tower trained from nothing for a short while; stage 1's semantic teacher.
size=l:    the 403M encoder and a text tower of the same depth. The report trains with a batch of 64K on 8B pairs, with
           Muon and learning rates and schedules of their own for vision, text and projection; its numbers are not
           published, those below are ours. Give it the vocabulary of `glmv train-vocabulary`.
text=siglip: tower, head and vocabulary of a SigLIP or SigLIP 2 checkpoint, --config.model.text.path, are the start of
           the text side; text=locked: and stay as they are.
sources=a+b: pairs on disk (glmv_jax/data/pairs) instead of the shipped corpus, under names of your own:

    glmv train --config experiments/cogvit_siglip.py:size=l,sources=web+wukong --workdir runs/siglip \
        --config.init_from=runs/mim \
        --config.data.sources.web.path='web-{00000..09999}.tar' --config.data.sources.web.weight=3 \
        --config.data.sources.wukong.path=wukong/ --config.data.sources.wukong.lang=zh
"""

from glmv_jax.config import parse_arg, presets

# The encoder has been trained (stage 1): half the rate, and a longer warm-up while the text side catches up. The text
# tower goes on learning rare words to the end, so its rate does not fall to zero.
VISION = {"schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.0}}
TEXT = {"schedule": {"warmup": 0.02, "decay": "cosine", "final": 0.1}}
PROJECTION = {"schedule": {"warmup": 0.02, "decay": "linear", "final": 0.0}}
SCALARS = {"schedule": {"warmup": 0.02, "decay": "constant"}}


def modules(text_mult):
    """Groups by module. text_mult: of the text tower's rate, 1.0 for one that starts fresh."""
    # In bfloat16 half as much travels, and an H100's update of this encoder takes 38 ms in place of 54.
    muon, adamw = {"kind": "muon", "wd": 0.1, "dtype": "bfloat16"}, {"kind": "adamw", "wd": 0.05}
    return (
        (r"vision/blocks/.*/kernel", {**muon, **VISION, "name": "vision", "lr_mult": 0.5}),
        (r"vision/.*", {**adamw, **VISION, "name": "vision_adamw", "lr_mult": 0.1}),
        (r"text/blocks/.*/kernel", {**muon, **TEXT, "name": "text", "lr_mult": text_mult}),
        (r"text/.*", {**adamw, **TEXT, "name": "text_adamw", "lr_mult": 0.15 * text_mult}),
        (r"(image|text)_head/.*", {**adamw, **PROJECTION, "name": "projection", "lr_mult": 0.15}),
        (r"scale/.*", {"kind": "adamw", "wd": 0.0, **SCALARS, "name": "scalars", "lr_mult": 1.0}),
    )


def nano_groups():
    """One schedule, as short runs need no more."""
    return (
        (r"vision/blocks/.*/kernel", {"kind": "muon", "wd": 0.1}),
        (r"text/blocks/.*/kernel", {"kind": "muon", "wd": 0.1, "lr_mult": 0.1}),
        (r"text/embed/.*", {"kind": "adamw", "wd": 0.05, "lr_mult": 0.5}),
        (r"scale/.*", {"kind": "adamw", "wd": 0.0, "lr_mult": 4.0}),
        (r".*", {"kind": "adamw", "wd": 0.05, "lr_mult": 0.15}),
    )


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", role="student", sources="", text="own")
    nano = arg.size == "nano"
    steps, batch = (300, 128) if nano else (120_000, 65_536)
    cfg = presets.run("siglip", steps, batch, init_subtrees=("vision",))
    cfg.model = presets.two_tower(arg.size)
    cfg.model.text.kind = "siglip" if arg.text == "locked" else arg.text
    if not nano:
        cfg.mesh, cfg.rules = presets.mesh(fsdp=-1), "fsdp"
        # Of a layer the products are kept and the rest is computed anew, which costs less than writing it down.
        cfg.model.vision.remat = cfg.model.text.remat = "dots"
    if arg.role == "teacher":
        cfg.steps, cfg.model.vision.depth = 110, 3

    # Of a source, see `Source` in glmv_jax/data/pairs; format "" is told from the path.
    entry = dict(path="", format="", weight=1.0, lang="auto", image="", text="", alike="image", split="train")
    cfg.data = {
        "sources": {name: dict(entry) for name in filter(None, arg.sources.split("+"))},  # none: the shipped corpus
        "heldout": 0.02 if nano else 0.001,  # share of the sources' records kept for evaluation
        "chinese": 0.5,  # share of Chinese texts, whatever the sources hold, where an image has one text
        "vocabulary": "",  # "": the shipped one; for other corpora one of `glmv train-vocabulary`
        "split_chinese": nano,  # Chinese one character at a time, see `data.text_rows`
        # Patches of an image row, drawn anew for each batch (NaFlex), and how often.
        "lengths": (48,) if nano else (128, 256, 576, 784, 1024),
        "length_shares": (1.0,) if nano else (0.2, 0.2, 0.2, 0.2, 0.2),
        "both_languages": nano and not arg.sources,  # a text in each language an image; else one
        "basics": 0.25 if nano and not arg.sources else 0.0,  # share of single shapes and symbols
        "texts": {"name": 0.3, "name+keywords": 0.5, "keywords": 0.2},
        "workers": 0 if nano else 8,
    }
    cfg.loss = {
        "impl": "dense" if nano else "ring_bidir",
        "chunk": 1024,  # rows of logits at a time, in the forms for many devices
        "wire": "float32" if nano else "bfloat16",  # dtype in which features travel there
        # Patches (and tokens) that a device embeds at a time, 0: all of its rows; the gradient is the same.
        "positions": 0 if nano else 16_384,
    }
    cfg.eval = {
        "patches": 48 if nano else 256,
        "pairs": 200 if nano else 1000,  # held-out pairs of the sources, a language
        # Data sets to evaluate on while training (see `glmv eval --help`): all pictures before and after, and in the
        # looks every eval_every steps `short` of each; 0: none then.
        "suite": {"root": "", "datasets": (), "short": 0},
    }
    if not nano:
        # TARGETS, not results: what the report gives for its own CogViT, and what `glmv eval` prints beside ours. The
        # report does not say which 38 and which 14 benchmarks these are; see glmv_jax/eval/suite.py.
        cfg.eval.targets = {"imagenet1k": 0.835, "suite_38": 0.704, "general_object_14": 0.451}
        cfg.eval.targets_from = "Figure 1 of the GLM-5V-Turbo report, CogViT-L (403M), zero-shot"
    # From few texts a tower learns little more than what words mean. With random branches, a probe for a pool and its
    # matrices at the full rate R@5 among 360 other concepts, set aside from training, was .12; with these it is .19.
    cfg.optim = {
        "lr": 8e-3 if nano else 1e-3,
        "clip": 1.0,
        "schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.0},
        "groups": nano_groups() if nano else modules(1.0 if arg.text == "own" else 0.1),
    }
    if arg.text == "locked":
        kept = [group for group in cfg.optim.groups if not group[0].startswith("text/")]
        cfg.optim.groups = ((r"(text|text_head)/.*", {"kind": "frozen"}), *kept)
    return cfg
