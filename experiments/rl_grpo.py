"""Stage 5: GRPO with rule rewards on eight visual tasks, sampled and trained in one process.

    glmv train --config experiments/rl_grpo.py:size=nano --workdir runs/rl --config.init_from=runs/sft

size=nano: two CPU cores, under three minutes. 64 prompts x 8 answers a step, clip-higher 0.2 / 0.28, no KL, no entropy
term, temperature 1. Held-out accuracy over its six tasks .47 to .49 greedy (gain .06 to .27), .42 to .45 drawn at
temperature 1 (gain .40 to .41), three seeds.
"""

from glmv_jax.config import parse_arg, presets

TASKS = ("read", "count", "name", "attribute", "spatial", "ground", "point", "chart")


def get_config(arg=None):
    arg = parse_arg(arg, size="nano")
    nano = arg.size == "nano"
    steps, batch = (95, 16) if nano else (2_000, 64)
    cfg = presets.run("rl", steps, batch)
    cfg.model = presets.vlm(arg.size)

    # At nano size `read` never earns a reward to learn from, and the answers of `ground` are twice as long as all
    # others; both are evaluated all the same, which shows whether they are forgotten.
    weights = {task: 1.0 for task in TASKS if not nano or task not in ("read", "ground")}
    cfg.data = presets.documents(arg.size, weights, seed=5, ahead=2)
    if nano:
        cfg.data.tokens, cfg.data.targets = 256, 208
    cfg.rollout = _answers(nano) | _form() | _asked() | {"workers": _workers()}
    cfg.loss = _loss(nano)
    cfg.rewards = {}  # a table of `rl.rewards.config`: workers, judges, sources; empty: the tasks' own rules, here
    # Runs whose weights wait in the host's memory: "init_from" or a folder for the policy that loss.kl is from, and
    # pairs (source, folder) of teachers for loss.distil, "*" for every other source.
    cfg.reference = {"policy": "", "teachers": ()}
    cfg.optim = {
        "lr": 1e-3 if nano else 1e-6,
        "clip": 1.0,
        "schedule": {"warmup": 0.02, "decay": "constant"},
        # At nano size training the encoder too costs an eighth more time and gains nothing that 1,152 questions show.
        "groups": ((r"mtp/.*", {"kind": "frozen"}), *presets.vlm_groups(vision=0.0 if nano else 0.5)),
    }
    cfg.eval = {
        "kinds": TASKS, "documents": 32, "questions": 96, "few": 16, "batch": 64, "max_new_tokens": 24, "shown": 4,
    }  # fmt: skip
    return cfg


def _answers(nano):
    """How answers are drawn, what of them is trained on, and what is kept."""
    return {
        "prompts": 64,
        "group": 8,
        "minibatches": 1,
        "rows": (16,) if nano else (16, 24, 32),
        "max_new_tokens": 14,
        "limits": (),  # with slots, kinds whose answers have another length: (("track", 80), ("code", 80))
        "thinking": 0,  # tokens that answers may think before; then </think> is put there. 0: they do not think
        "temperature": 1.0,
        "top_p": 1.0,
        "advantage": "grpo",  # all of these and of the loss: glmv_jax/losses/policy
        "components": (),  # of grades with their weights, for gdpo: (("score", 1.0), ("format", 0.5))
        "overlong": {"buffer": 0, "penalty": 1.0, "drop": False},  # tokens before max_new_tokens that cost reward
        "proximal": False,  # the trainer's own log-probabilities before the update, beside the sampler's
        # Beside the checkpoints: answers, one a line; pictures at most, and of how many groups of a source each step.
        "samples": {"rows": True, "pictures": 2000, "groups": 2},
    }


def _form():
    """Whether answers are drawn before each update or beside the training."""
    return {
        "pipeline": "sync",  # "async": rollouts go on while the policy is trained; see rl/pipeline
        # Answers that the engine writes at a time, one taking the place of another; 0: a batch at a time, all to the
        # same length, which is faster where answers are about as long (here, see inference/sampler.py).
        "slots": 0,
        # Tokens that the MTP head drafts a step, of which the policy keeps what it would have drawn; wants slots.
        # Answers have the same distribution, and come in fewer passes.
        "drafts": 0,
        # Of "async" alone:
        # URL of a server that draws the answers (glmv serve --weights; vLLM, SGLang: `rl.pipeline.dialects`), "": this
        # process does; the folder in which it finds new weights, under one path for both, "" for the run's weights/
        "engine": "",
        "weights": "",
        "staleness": 1,  # updates that a token may be old
        "late": "wait",  # "wait" for slow groups, "drop" or "abort" them
        # With "" a batch is of the groups that are complete first, and what is slow is in fewer than the mixture says;
        # "source": of as many of each source as were drawn for it; "form": as many questions and as many episodes.
        "quotas": "",
        "in_flight": 0,  # groups that are written at a time; 0: as many as can be trained in time
        "seconds": 0.0,  # "abort": of a step's rollouts; 0: no limit
    }


def _workers():
    """Of "async" alone: how many processes of their own each role has, as Ray actors on any number of machines; 0: it
    is done in this one. Whatever the config names (a vocabulary, a checkpoint) has to be under one path everywhere."""
    return {
        "ray": "",  # address of the cluster: "auto", HOST:6379; "": one is started on this machine, for this run
        "rollout": 0,  # engines, each with all of rollout.slots, and a copy of the weights
        "reward": 0,  # graders, each with all of cfg.rewards' workers
        "environment": 0,
        # What Ray reserves for each process; resources: pairs, (("TPU", 4.0),). Engines compute on the GPUs or the
        # resources that they reserve; where they reserve none, and graders and environments always, on processors.
        "needs": {
            role: {"num_cpus": 1.0, "num_gpus": 0.0, "resources": ()} for role in ("rollout", "reward", "environment")
        },
    }


def _asked():
    """What is asked in place of the next prompts of the mixture."""
    return {
        # Groups whose rewards are all equal are not trained on: others take their place (async), or as many more are
        # asked at once as there will be of them, by the running mean of 1 / (1 - their share), at most `most` times a
        # batch; of the useful ones the most balanced are kept (sync; async with late: as many more begin at once).
        "dynamic": False,
        "expansion": {"decay": 0.9, "most": 4.0},
        # More of the levels of tasks (`rl.levels`) that are solved half of the time: weight max(w_min, 4 p (1 - p));
        # decay: of their pass rates p.
        "curriculum": {"on": False, "w_min": 0.05, "decay": 0.7},
        # (name as `rl.envs` has it, weight beside those of data.weights, which may all be 0), and perhaps its options:
        # ("gymnasium/FrozenLake-v1", 1.0, {"is_slippery": False, "instructions": "Reach the goal."}).
        "environments": (),
        # Rows of an update for episodes; their limits, 0: what a row holds; environments at a time; sync: tries.
        "episodes": {
            "rows": 8, "turns": 8, "tokens": 0, "patches": 0, "seconds": 300.0, "parallel": 8, "tries": 2,
        },
    }  # fmt: skip


def _loss(nano):
    """What is learnt from them: see `glmv_jax.losses.policy`."""
    return {
        "surrogate": "clip",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": 0.0,
        "ratio_cap": 5.0,
        "tv": 0.2,
        "penalty": 0.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "opsm": 0.0,
        "aggregation": "seq-mean-token-mean",
        "max_length": 0,
        "kl": {"kind": "k3", "factor": 0.0},
        "distil": {"kind": "none", "factor": 1.0, "top_k": 32},
        "correction": {
            "weight": "none", "outside": "clamp", "low": 0.0, "high": 2.0, "normalise": False, "veto": 0.0,
            "reject": "none", "over": "token", "limit": 0.1,
        },
        "chunk": 256 if nano else 1024,  # as in SFT
    }  # fmt: skip
