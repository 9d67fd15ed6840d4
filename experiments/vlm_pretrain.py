"""Stage 3: the vision-language model on captions, reading, grounding, charts and plain text, with MMTP.

    glmv train --config experiments/vlm_pretrain.py:size=nano --workdir runs/pretrain --config.init_from=runs/siglip

size=nano: two CPU cores, about five minutes; a 3.1M-parameter model on rows of 112 tokens and 128 patches.
           Held-out loss 8.7 -> 2.17, without the image 3.0 to 3.6; MMTP drafts right .54; three seeds.
size=l:    CogViT-403M with GLM-OCR's language model; data of that scale are not shipped.
mmtp=image_token|embeddings|embeddings_stopped|masked: what the MTP head sees of images (section 2.2 of the report
           adopts the first).
sources=a+b: documents and conversations on disk (glmv_jax/data/local says what a record is) beside the built-in
           generators, under names of your own; corpus=false: in place of them.

    glmv train --config experiments/vlm_pretrain.py:size=l,sources=web+ocr,corpus=false --workdir runs/pretrain \
        --config.init_from=runs/siglip --config.data.vocabulary=vocab.model \
        --config.data.sources.web.path='web-{000..127}.jsonl' --config.data.sources.web.weight=3 \
        --config.data.sources.ocr.path=pages/ --config.data.sources.ocr.category=ocr

    glmv show-batch --config ... shows what a batch of that holds.
"""

from glmv_jax.config import parse_arg, presets


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", mmtp="image_token", sources="", corpus=True)
    nano = arg.size == "nano"
    steps, batch = (380, 16) if nano else (50_000, 512)
    cfg = presets.run("pretrain", steps, batch, init_subtrees=("vision",))
    cfg.model = presets.vlm(arg.size)
    cfg.model.mtp.option = arg.mmtp
    if not nano:
        cfg.mesh, cfg.rules = presets.mesh(fsdp=-1), "fsdp"

    weights = {
        "caption": 1.0, "describe": 2.0, "table": 0.5, "text": 0.4, "name": 2.5, "attribute": 1.5, "count": 1.2,
        "point": 2.0, "spatial": 2.5, "chart": 1.0, "ground": 1.0, "read": 2.0,
    }  # fmt: skip
    files = presets.files(arg.size, arg.sources)
    cfg.data = presets.documents(arg.size, weights if arg.corpus else {}, seed=3, **files)
    cfg.loss = {"mtp": 0.3, "chunk": 256 if nano else 1024}  # chunk: tokens that have logits at a time, on a device
    # At nano size the encoder learns slowly: what stages 1 and 2 taught it (shapes, above all) is soon lost to the
    # rough gradient of a decoder that knows nothing yet.
    cfg.optim = {
        "lr": 6e-3 if nano else 3e-4,
        "clip": 1.0,
        "schedule": {"warmup": 0.05, "decay": "cosine", "final": 0.2},
        "groups": presets.vlm_groups(vision=0.1 if nano else 0.5),
    }
    cfg.eval = {"kinds": ("caption", "describe", "table") if arg.corpus else (), "documents": 48, "drafts": 0}
    return cfg
