"""Stage 3 with GLM-5's decoder: latent attention, an indexer, mixtures of experts, MMTP of depth 3.

    glmv train --config experiments/glm5v_pretrain.py:size=nano --workdir runs/glm5v --config.init_from=runs/siglip

size=nano: two CPU cores; 8 experts, 48 keys a query; the data of vlm_pretrain.py.
size=l:    CogViT-403M with GLM-5 (743.9 B parameters, and 9.9 B of the MTP layer); a pod, for example of 512 chips
           (fsdp 16 x expert 32: glmv shapes --config ... --devices 512). Data of that scale are not shipped.
mmtp=image_token|embeddings|masked: as in vlm_pretrain.py.

`loss.aux` weighs the sequence-wise balance loss and the indexer's; `experts.bias_rate` is what a step moves a router's
bias by (both DeepSeek-V3's: arXiv 2412.19437, section 4.2; the report gives none).
"""

from glmv_jax.config import load, parse_arg, presets


def get_config(arg=None):
    arg = parse_arg(arg, size="nano", mmtp="image_token")
    cfg = load(__file__.replace("glm5v_", "vlm_") + f":size={arg.size},mmtp={arg.mmtp}")
    cfg.model = presets.glm5v(arg.size)
    cfg.model.mtp.option = arg.mmtp
    if arg.size == "l":  # of 512 chips: 16 x 32. Heads are whole: kernels for an indexer that learns want them so
        cfg.mesh, cfg.rules = presets.mesh(fsdp=-1, expert=32), "fsdp_expert_tensor"
        cfg.xla = "sparse"  # all that is no expert is split over all of them
    cfg.loss.aux = {"balance": 1e-4, "index_loss": 1.0}
    cfg.experts = {"bias_rate": 1e-3}
    cfg.optim.groups = (
        (r".*router_bias", {"kind": "frozen"}),
        (r".*/moe/(gate|up|down)", {"kind": "muon", "wd": 0.1}),
        (r".*/attention/(uk|uv)", {"kind": "muon", "wd": 0.1}),
        *cfg.optim.groups,
    )
    return cfg
