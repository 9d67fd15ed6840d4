"""Policy-gradient losses of reinforcement learning with groups of answers: the equations, and where they are from.

Symbols. Token t of answer i of a group of G. pi: the policy that is trained; mu: what drew the tokens; pi_old: the
trainer's own policy before the first update on them ("proximal"), which is taken to be mu where it is not measured.
r = pi / pi_old, rho = pi_old / mu, A: advantage, sg: stop-gradient, e_l, e_h = clip_low, clip_high. w: 1 on tokens that
the model drew, 0 on all else. Logarithms of ratios are held within +-20. What is minimised is

    aggregate over tokens of  [ sg(c) l  +  kl.factor KL  +  distil.factor D ]

Advantages (`advantages`), of rewards R in a group; a group of equal rewards has exactly 0.
    grpo         (R - mean) / (std + 1e-6), std with ddof 1                 DeepSeekMath, arXiv 2402.03300
    dr_grpo      R - mean                                                   Dr.GRPO, arXiv 2503.20783
    batch_std    (R - mean of the group) / (std of the batch + 1e-6)        Lite PPO, arXiv 2508.08221
    rloo         G / (G - 1) (R - mean)                                     arXiv 2402.14740
    reinforce++  (R - mean of the group), whitened over the batch           arXiv 2501.03262
    max_rl       (R - mean) / mean, R >= 0                                  MaxRL, arXiv 2602.02710
    gdpo         sum_c weight_c grpo(R_c), whitened over the batch          GDPO, arXiv 2601.05242
    none         0: what is learnt is the distillation's
    Overlong answers: R + min(-(length - (limit - buffer)) / buffer * penalty, 0), lengths in tokens (DAPO, arXiv
    2503.14476, 3.4). Groups are left out by their raw rewards (`informative`), not by these.

Surrogates l (`surrogates`).
    clip         max(-A r, -A clip(r, 1 - e_l, 1 + e_h)); e_h > e_l is DAPO's clip-higher
    (dual_clip)  where A < 0: min(that, -c A)                               arXiv 1912.09729
    gspo         clip of s_i = exp(mean_t log r), its gradient through log pi_t: s_it = sg(s_i) pi_t / sg(pi_t);
                 aggregated by seq-mean-token-mean                          GSPO, arXiv 2507.18071
    cispo        -sg(min(r, ratio_cap)) A log pi; ratio_cap is the cap itself, not what is added to 1
                                                                            MiniMax-M1, arXiv 2506.13585
    double_sided -sg(f) A log pi, f = pi / mu within (1 - e_l, 1 + e_h), else 0; knows no pi_old
                                                                            GLM-5, arXiv 2602.15763
    binary_tv    -A q + penalty (log q)^2, q = pi / mu; -A q left out where A > 0 and pi - mu > tv, or A < 0 and
                 pi - mu < -tv                                              DPPO, arXiv 2602.04879
    ipo          the same, left out where |pi - mu| > tv                    PrimeIntellect-ai/prime-rl
    gmpo         -A exp(mean_t held), held = min(log r, e_h) where A > 0, max(log r, -e_l) where A < 0: bounds of the
                 logarithm; aggregated by seq-mean-token-mean               GMPO, arXiv 2507.20673
    sapo         -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg
                                                                            SAPO, arXiv 2511.20347

Corrections c of the mismatch between pi_old and mu (`corrections`), which never get a gradient.
    weight       clamp or zero outside [low, high]: rho of the token, its product over the answer ("sequence"), or
                 exp(mean log rho) ("geometric"). TIS is token + clamp to [0, 2]; IcePop (GLM-5's pop) token + zero
                 outside [1/2, 2]. normalise: divided by their mean over the step
    veto         0 for every token of an answer in which one has rho < veto
    reject       0 where an estimate of KL(mu || pi_old) exceeds limit; of a token, or mean, sum or max over the answer:
                 k1 = |-log rho| (after mean or sum), k2 = (log rho)^2 / 2, k3 = rho - 1 - log rho
    opsm         (beside `correction`) 0 for every token with A < 0 of an answer whose mean log(pi_old / pi) exceeds
                 it: 1e-4 in THUDM/slime; "off-policy sequence masking", DeepSeek-V3.2, arXiv 2512.02556
    Without a measured pi_old only veto and reject are left, and rho is sg(pi) / mu: a weight would count r twice.
    A rejected token still counts in denominators. Always measured: mismatch_kl (mean k3), largest |log rho|, share of
    tokens with c = 0, effective sample size (sum rho)^2 / (n sum rho^2). Sources: Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training" (2025); IcePop, Ring-1T, arXiv 2510.18855; Liu et al., "When
    speed kills stability" (2025).

Divergences (`divergences`), d = log pi - log pi_ref.
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (J. Schulman, "Approximating KL divergence", 2020); k3+ has the value of
    k3 and the gradient of k2, which is that of KL(pi || pi_ref).
    D, on-policy distillation: "sampled" adds -factor sg(log pi - log pi_T) to A (GLM-5; Thinking Machines, 2025);
    "top_k" is KL(pi || pi_T) over the teacher's k likeliest tokens and one outcome for all others, a lower bound that
    is exact at k = V; `reverse_kl` is that of the whole vocabulary.

Aggregation (`aggregation`), denominators of the whole step, whatever micro-batches and devices it is cut into.
    token-mean               sum w l / sum w                                DAPO
    seq-mean-token-mean      mean over answers of (sum w l / sum w)         GRPO; GLM-V, arXiv 2507.01006
    seq-mean-token-sum       mean over answers of sum w l
    seq-mean-token-sum-norm  mean over answers of sum w l / max_length      Dr.GRPO
    token-sum                sum w l
"""

from glmv_jax.losses.policy.advantages import ADVANTAGES, gdpo_advantages, group_advantages, informative, overlong
from glmv_jax.losses.policy.aggregation import AGGREGATIONS, Answers, aggregate, denominators
from glmv_jax.losses.policy.basics import log_ratio
from glmv_jax.losses.policy.corrections import Correction, Mismatch, mismatch
from glmv_jax.losses.policy.divergences import KL, Distil, kl, reverse_kl, reverse_kl_top, sampled_advantage
from glmv_jax.losses.policy.measures import mismatch_by_source, with_effective_sizes
from glmv_jax.losses.policy.objective import Objective, Whole, policy_loss, whole
from glmv_jax.losses.policy.surrogates import SURROGATES

__all__ = [
    "ADVANTAGES", "AGGREGATIONS", "Answers", "Correction", "Distil", "KL", "Mismatch", "Objective", "SURROGATES",
    "Whole", "aggregate", "denominators", "gdpo_advantages", "group_advantages", "informative", "kl", "log_ratio",
    "mismatch", "mismatch_by_source", "overlong", "policy_loss", "reverse_kl", "reverse_kl_top", "sampled_advantage",
    "whole", "with_effective_sizes",
]  # fmt: skip
