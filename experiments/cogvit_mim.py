"""Stage 1: CogViT by masked-image distillation from a semantic and a texture teacher.

    glmv train --config experiments/cogvit_mim.py:size=nano --workdir runs/mim \
        --config.teachers.semantic.path=runs/teacher
    glmv train --config experiments/cogvit_mim.py:size=l --workdir runs/mim \
        --config.teachers.semantic.path=siglip2-so400m-patch14-224 \
        --config.teachers.texture.path=dinov3-vitl16-pretrain-lvd1689m \
        --config.data.sources.natural='natural-{000..999}.tar' --config.data.sources.scientific=charts/

size=nano: two CPU cores, about a minute; held-out loss 5.5 -> 2.02, nearest-neighbour probe .18 -> .22, three seeds.
           The semantic teacher is the image tower of a stage-2 run (experiments/cogvit_siglip.py:role=teacher), the
           texture teacher is HOG and needs no file.
size=l:    the 403M encoder at 224 px, 90 of 256 patches masked, a SigLIP 2 and a DINOv3 teacher, as in section 2.1 of
           the report. Which of their sizes, and steps, batch and rates, are not published; those here are a start.
           Teachers are folders as Hugging Face saves them, pictures are folders or tars of samples.

The teachers can see their crops beforehand, for many runs or on other machines; a crop at size=l takes 1.1 MB:

    glmv cache-teachers --config experiments/cogvit_mim.py:size=l --out features --items 1000000 \
        --config.teachers.semantic.path=... --config.teachers.texture.path=... --config.data.sources.natural=...
    glmv train --config experiments/cogvit_mim.py:size=l --workdir runs/mim \
        --config.data.teacher_cache=features --config.data.sources.natural=...
"""

from glmv_jax.config import parse_arg, presets


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", semantic=True, texture=True)
    nano = arg.size == "nano"
    steps, batch = (180, 64) if nano else (100_000, 4096)
    cfg = presets.run("mim", steps, batch)
    cfg.model = presets.vision(arg.size)
    if not nano:
        cfg.mesh, cfg.rules = presets.mesh(fsdp=-1), "fsdp"
        # Of a layer only its input is kept, 13 MB an image over all layers. "dots" keeps the products too, 180 MB, and
        # computes less; with it, unroll=24 spares a GPU the copies of a loop (225 -> 189 ms a step of 128, H100).
        cfg.model.vision.remat = "full"

    cfg.data = {
        "weights": {"natural": 0.8, "instruction": 0.1, "scientific": 0.1},
        # Where each comes from: a folder of pictures or tar files of samples; "": the shipped corpus.
        "sources": {"natural": "", "instruction": "", "scientific": ""},
        "heldout": 0.01,  # share of a source's own pictures (at least 8) to report on; 0: report on the shipped corpus
        # A folder of features from `glmv cache-teachers`, read instead of running the teachers; "": they run.
        "teacher_cache": "",
        "crop_scale": (1.0, 1.0) if nano else (0.2, 1.0),  # share of a picture's area that a crop shows
        "size": 48 if nano else 224,
        "mask_ratio": 0.35,
        "mask_kind": "blockwise",
        "workers": 0 if nano else 8,
    }
    # kind: siglip, dinov3 (their path is the folder of a public checkpoint), tower (a run directory) or hog (no path).
    # size: side in pixels of the image that the teacher sees, 0 where its grid of patches is the student's.
    # normalise: channel (running mean and variance of each channel) or phi_s (all turned to have the same variance).
    entry = dict(path="", size=0, dtype="float32" if nano else "bfloat16", bins=9, normalise="channel")
    # In the few steps of nano semantics have to count for more: with equal weights the nearest-neighbour probe gained
    # .025 and .003 over an untrained encoder, with these .047 and .053 (two seeds; a teacher with another text pool).
    cfg.teachers = {
        "semantic": dict(entry, kind="tower" if nano else "siglip", weight=3.0 if nano else 1.0),
        "texture": dict(entry, kind="hog" if nano else "dinov3", weight=0.5 if nano else 1.0),
    }
    for name in ("semantic", "texture"):
        if not arg[name]:  # semantic=false or texture=false: the other one alone
            del cfg.teachers[name]
    cfg.loss = {
        "on": "masked",  # or "all"
        "cosine": 1.0, "smooth_l1": 1.0, "mse": 0.0,  # factors of the terms
        "head_hidden": 256 if nano else 2048,
        "calibration": 16 if nano else 2,  # batches that phi_s takes its statistics from, before the first step
    }  # fmt: skip

    cfg.optim = {
        "lr": 6e-3 if nano else 1e-3,
        "clip": 1.0,
        "schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.05},
        "groups": (
            (r"vision/blocks/.*/kernel", {"kind": "muon", "wd": 0.05, "dtype": "float32" if nano else "bfloat16"}),
            (r".*", {"kind": "adamw", "wd": 0.05}),
        ),
    }
    # suite: data sets for a kNN probe while training, as in cogvit_siglip.py.
    cfg.eval = {"batches": 4, "suite": {"root": "", "datasets": (), "short": 0}}
    return cfg
