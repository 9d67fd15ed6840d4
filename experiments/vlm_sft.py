"""Stage 4: supervised fine-tuning on questions and answers in the chat template.

    glmv train --config experiments/vlm_sft.py:size=nano --workdir runs/sft --config.init_from=runs/pretrain

role=control: goes on with SFT from a finished SFT run for as long as an RL run took (the comparison of the quickstart):
    glmv train --config experiments/vlm_sft.py:size=nano,role=control --workdir runs/sft_more \
        --config.init_from=runs/sft --config.match_wall=runs/rl
size=nano: two CPU cores, about half a minute. A cold start: it teaches the form of an answer, and RL the rest. Held-out
accuracy over the six tasks of RL .21 to .43 greedy, .02 to .05 drawn at temperature 1, three seeds.
sources=a+b: conversations on disk (glmv_jax/data/local says what a record is), with tools and thinking, beside the
built-in questions, under names of your own; corpus=false: in place of them.

    glmv train --config experiments/vlm_sft.py:size=l,sources=chats,corpus=false --workdir runs/sft \
        --config.init_from=runs/pretrain --config.data.sources.chats.path=chats/

Windows drawn from a tree (glmv_jax/data/gui: perceive, ground, step, trajectory, critic) are one more source, with
weights of their own: --config.data.gui.ground=1 --config.data.gui.trajectory=1 (up to 850 tokens and six pictures).
"""

from glmv_jax.config import parse_arg, presets

TASKS = ("read", "count", "name", "attribute", "spatial", "ground", "point", "chart")


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", role="student", sources="", corpus=True)
    nano = arg.size == "nano"
    steps, batch = (20, 16) if nano else (10_000, 256)
    cfg = presets.run("sft", steps, batch)
    cfg.model = presets.vlm(arg.size)
    if not nano:
        cfg.mesh, cfg.rules = presets.mesh(fsdp=-1), "fsdp"

    weights = {task: 1.0 for task in TASKS} if arg.corpus else {}
    cfg.data = presets.documents(arg.size, weights, seed=4, **presets.files(arg.size, arg.sources))
    cfg.loss = {"mtp": 0.3, "chunk": 256 if nano else 1024}  # chunk: tokens that have logits at a time, on a device
    cfg.optim = {
        "lr": 4e-3 if nano else 1e-4,
        "clip": 1.0,
        "schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.2},
        "groups": presets.vlm_groups(vision=0.1 if nano else 0.5),
    }
    cfg.eval = {
        "kinds": TASKS if arg.corpus else (), "documents": 32, "questions": 96, "few": 16, "batch": 64,
        "max_new_tokens": 24, "shown": 4, "drafts": 0,
    }  # fmt: skip
    if arg.role == "control":
        cfg.data.seed, cfg.steps = 6, 1_000_000
        cfg.optim.lr, cfg.optim.schedule = 2e-3, {"warmup": 0, "decay": "constant"}
    return cfg
