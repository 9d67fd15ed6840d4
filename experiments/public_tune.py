"""Stage 4 on a public checkpoint and your own files: adapters (LoRA) of a frozen base, small enough for one device.

    glmv import-hf GLM-OCR/ checkpoints/glm-ocr
    glmv train --config experiments/public_tune.py:checkpoint=checkpoints/glm-ocr,sources=mine --workdir runs/tuned \
        --config.data.sources.mine.path=mine/ --config.data.sources.mine.prompt="Text Recognition:"
    glmv export-hf runs/tuned GLM-OCR-tuned/

The model's sizes, its tokenizer, its chat's form and its pictures' sizes are the checkpoint's. mine/ holds pictures
with a text of the same name beside each (page.png, page.txt), the answers to the prompt; or the path is a mine.jsonl
with lines such as {"messages": ...} as the OpenAI API has them; glmv_jax/data/local/schema.py says what else.
full=true: all parameters are trained, not adapters. size=nano: rows as small as those of the nano recipe, for a try.

rank, targets and alpha are in `lora`; the base is kept as it is stored. Memory: the base, adapters with their optimiser
state, and while a step runs a copy of the target matrices and of their gradients. benchmarks/public_tune.py does all of
it with GLM-OCR's true shapes (1.1 B with its encoder) on a CPU; it has not been run on an accelerator yet.
"""

from glmv_jax.config import parse_arg, presets


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", sources="", full=False, size="l")
    nano = arg.size == "nano"
    cfg = presets.run("sft", steps=300, batch=8, save_every=100)
    cfg.model = presets.public(arg.checkpoint)
    cfg.data = presets.documents(arg.size, {}, seed=4, **presets.files(arg.size, arg.sources))
    cfg.data.update(dict(sizing="smart", workers=0, vocabulary=presets.public_vocabulary(arg.checkpoint)))
    if not nano:  # one device
        cfg.data.update(dict(tokens=2048, patches=4096, targets=1024, image_patches=4096))
    cfg.loss = {"mtp": 0.1, "chunk": 256 if nano else 1024}
    cfg.optim = {
        "lr": 2e-4,
        "clip": 1.0,
        "schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.1},
        "groups": ((r"vision/.*", {"kind": "frozen"}), (r".*", {"kind": "adamw", "wd": 0.0})),
    }
    if arg.full:
        cfg.init_from, cfg.optim.lr = arg.checkpoint, 2e-5
    else:
        cfg.lora.update(dict(base=arg.checkpoint, rank=16, dtype="stored"))
    cfg.eval = {
        "kinds": (), "documents": 32, "questions": 8, "few": 8, "batch": 8, "max_new_tokens": 64, "shown": 4,
    }  # fmt: skip
    return cfg
