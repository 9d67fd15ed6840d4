"""Stage 5 on 31 kinds of tasks at once (section 2.3 of the report: less oscillation when tasks train together).

    glmv train --config experiments/rl_mixed.py:role=start --workdir runs/mixed/start --config.init_from=RUN/pretrain
    glmv train --config experiments/rl_mixed.py --workdir runs/mixed/joint --config.init_from=runs/mixed/start
    glmv train --config experiments/rl_mixed.py:task=count --workdir runs/count --config.init_from=runs/mixed/start

RUN: of launch/quickstart.sh. `python benchmarks/rl_mixed.py` does all of this and compares them; its numbers are in
benchmarks/results/rl_mixed_nano.json: 1,000 steps lift the held-out reward of drawn answers from .315 to .361, 27 of 31
kinds, mean gain .046 (.025 to .069 over kinds); greedy ones stay as they were, +.004 (-.013 to .022). No kind is
forgotten: the worst, `arithmetic`, loses .021 +- .012 on 672 further questions. Half of the gain comes from looking: it
is .023 of .048 where both see another question's image. An earlier start of 150 steps, with the encoder at a tenth of
the rate, looked at nothing but what `name` asks. With "grpo" advantages and a constant rate the reward had not risen
after 212 steps, while the entropy fell from 1.0 to .45; both were changed at once.
role=start: a cold start by supervised tuning on the tasks' own questions and gold answers, of another seed than RL's.
task=NAME: one kind alone, with as many questions as `joint` spends on it, in batches a quarter as large.
size=nano: one CPU thread; 64 prompts x 8 answers a step, 64 patches a question. Answers of the kinds of LONG take up
to 80 tokens, of the others 32; they are asked half as often. Five of the 36 kinds are left out: answers
of `tabular`, `gui_perceive`, `svg` and `ui_code` take 100 to 220 tokens there, `captioning` asks a judge.
size=l: a slice of one pod, all kinds but `captioning`.
"""

from glmv_jax.config import parse_arg, presets

SHORT = (
    "read", "count", "name", "attribute", "spatial", "ground", "point", "chart", "line", "document", "formula", "refer",
    "geometry", "arithmetic", "puzzle", "riddle", "reasoning", "difference", "hallucination", "instruction", "search",
    "event", "compare", "crop_read", "gui_ground", "gui_step", "gui_trajectory", "gui_critic",
)  # fmt: skip
LONG = ("box3d", "track", "code")
LONGER = ("tabular", "gui_perceive", "svg", "ui_code")  # not at nano size


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", role="joint", task="")
    nano = arg.size == "nano"
    weights = {kind: 1.0 for kind in SHORT} | {kind: 0.5 for kind in (LONG if nano else (*LONG, *LONGER))}
    return _start(arg.size, weights) if arg.role == "start" else _rl(arg.size, weights, arg.task)


def _data(size, weights, seed, **more):
    sizes = dict(image_patches=64, prompt_tokens=144) if size == "nano" else {}
    return presets.documents(size, weights, seed=seed, **sizes, **more)


def _eval(weights):
    """A glance; benchmarks/rl_mixed.py asks more."""
    kinds = tuple(kind for kind in weights if weights[kind])
    return {
        "kinds": kinds, "documents": 4, "questions": 8, "few": 4, "batch": 64 if len(kinds) > 1 else 8,
        "max_new_tokens": 80, "shown": 2,
    }  # fmt: skip


def _start(size, weights):
    nano = size == "nano"
    cfg = presets.run("sft", *((1_500, 16) if nano else (2_000, 256)))
    cfg.model = presets.vlm(size)
    cfg.data = _data(size, weights, seed=7, **presets.files(size, ""))
    if nano:
        cfg.data.tokens, cfg.data.targets, cfg.data.patches = 256, 160, 256
    cfg.loss = {"mtp": 0.3, "chunk": 256 if nano else 1024}
    cfg.optim = {
        "lr": 4e-3 if nano else 1e-5, "clip": 1.0, "schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.1},
        "groups": presets.vlm_groups(vision=0.5),
    }  # fmt: skip
    cfg.eval = {**_eval(weights), "drafts": 0}
    return cfg


def _rl(size, weights, single):
    nano = size == "nano"
    steps, prompts = (300, 64) if nano else (2_000, 256)
    if single:  # as many questions of this kind as `joint` asks
        steps, prompts = round(4 * steps * weights[single] / sum(weights.values())), prompts // 4
        weights = {kind: float(kind == single) for kind in weights}
    cfg = presets.run("rl", steps, 16, log_every=1, save_every=25)
    cfg.model = presets.vlm(size)
    cfg.data = _data(size, weights, seed=8, ahead=2)
    if nano:
        cfg.data.tokens, cfg.data.targets, cfg.data.patches = 384, 288, 256
    cfg.rollout = {
        "prompts": prompts, "group": 8 if nano else 16, "minibatches": 1,
        "rows": ((6,) if single else (16,)) if nano else (64, 96, 128),
        "max_new_tokens": 32 if nano else 4096, "temperature": 1.0, "top_p": 1.0,
        # Side by side, as some answers are much longer than others; 1.45 s of CPU a step of 512 in place of 1.64.
        "slots": 128 if nano else 0, "limits": tuple((kind, 80) for kind in LONG) if nano else (),
        "advantage": "dr_grpo", "components": (), "overlong": {"buffer": 0, "penalty": 1.0, "drop": False},
        "pipeline": "sync", "dynamic": False, "proximal": False,
    }  # fmt: skip
    cfg.loss = {
        "surrogate": "clip", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0, "ratio_cap": 5.0, "tv": 0.2,
        "penalty": 0.0, "aggregation": "seq-mean-token-mean", "max_length": 0, "kl": {"kind": "k3", "factor": 0.0},
        "distil": {"kind": "none", "factor": 1.0, "top_k": 32},
        "correction": {
            "weight": "none", "outside": "clamp", "low": 0.0, "high": 2.0, "normalise": False, "veto": 0.0,
            "reject": "none", "over": "token", "limit": 0.1,
        },
        "chunk": 256 if nano else 1024,
    }  # fmt: skip
    cfg.rewards = {}
    cfg.reference = {"policy": "", "teachers": ()}
    cfg.optim = {
        "lr": 1e-3 if nano else 1e-6, "clip": 1.0, "schedule": {"warmup": 0.02, "decay": "cosine", "final": 0.1},
        "groups": ((r"mtp/.*", {"kind": "frozen"}), *presets.vlm_groups(vision=0.0 if nano else 0.5)),
    }  # fmt: skip
    cfg.eval = _eval(weights)
    return cfg
