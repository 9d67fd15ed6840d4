"""The ablation of the MMTP design (section 2.2, Figure 2 of the report): what the prediction head sees of images.

    glmv sweep --config experiments/mmtp_ablation.py:size=nano --workdir runs/mmtp --seeds 0..4 \
        --set model.mtp.option=embeddings,masked,image_token --config.init_from=runs/quickstart/siglip
    glmv sweep --config experiments/mmtp_ablation.py:size=0p5b --workdir runs/mmtp --seeds 0..2 \
        --set model.mtp.option=embeddings,masked,image_token --config.init_from=runs/siglip

A run is one option and one seed; alone: `glmv train --config experiments/mmtp_ablation.py:size=nano,option=masked`.
With the same seed the options see the same batches and begin with the same parameters, so the sweep's report compares
them seed by seed. A `<|end_of_image|>` stands between an image and the text behind it, so no token that is learnt has
an image as the head's own input: the options differ in what the head's attention finds at images, and in whether the
encoder learns through it. Without init_from the encoder learns from nothing, and little in runs as short as nano's.

size=nano: the 3.1M-parameter model of vlm_pretrain. A step takes 1.1 s of CPU time, so on two cores that have nothing
           else to do about five minutes a run and an hour and a quarter for all fifteen; up to 3.6 GiB.
           Measured with --config.steps=240 and five seeds (benchmarks/README.md): no option is steadier. The head's
           held-out loss behind images is lowest with embeddings, by .007 of 1.08 nats (95 %: .004 to .010), which is
           not what the report says; its drafts go further with image_token, 2.26 tokens a pass to 2.20 (95 %: .01 to
           .11 more). The main loss is the same to .005.
size=0p5b: a language model of 499M parameters: 24 layers of width 1024 (377.6M) and, not tied, the embedding table and
           the output head of GLM's 59,392 pieces (121.6M). The MTP head (17.8M), the encoder (404M) and the merger
           (14.7M) come on top. 64 rows of 2,048 tokens and 4,096 patches a step, one to a chip of a v5p slice of 64,
           sharded over all of them (four rows to a chip do not fit: 196 GB of temporaries by the compiler, while
           attention is the plain one; that one does has not been shown). The report says no more of its own than "a
           0.5B model"; rows, steps, batch and rate here are ours, and data of that scale are not shipped. EXPECTED, by
           the report: a lower and steadier training loss with image_token than with embeddings; no numbers are given.
"""

from glmv_jax.config import load, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", option="image_token")
    base = "l" if arg.size == "0p5b" else arg.size
    cfg = load(__file__.replace("mmtp_ablation.py", f"vlm_pretrain.py:size={base},mmtp={arg.option}"))

    # Nineteen documents of twenty have an image, and a row has room for all that its text asks for (a third of the
    # tokens of nano are visual). Text alone is a control: without an image the three options are the same function.
    cfg.data.weights.update({"caption": 2.0, "text": 1.0})
    cfg.eval.drafts = 3  # of the head, looped, when accept lengths are measured
    if arg.size == "nano":
        cfg.data.patches, cfg.log_every = 192, 5
        return cfg
    cfg.steps, cfg.batch, cfg.eval_every = 20_000, 64, 1_000
    cfg.data.update({"tokens": 2048, "patches": 4096, "targets": 1024, "image_patches": 1024, "prompt_tokens": 1024})
    if arg.size == "0p5b":
        cfg.model.decoder.update({"depth": 24, "width": 1024, "mlp": 3072})
    return cfg
