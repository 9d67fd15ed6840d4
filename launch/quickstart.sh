#!/usr/bin/env bash
# The whole recipe at size=nano, on any Linux machine with Python 3.11 or 3.12 and no accelerator:
# five stages, one after the other, each from the checkpoint of the one before, then a table and a page of pictures.
#
#   bash launch/quickstart.sh [run-dir] [seed]        (default: runs/quickstart 0)
#
# Stop it whenever you like (Ctrl-C, kill -9, a power cut): the same command goes on where it stopped, and stages that
# are finished say so and are passed over.
set -euo pipefail

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
  -*)
    echo "quickstart.sh: unknown option $1; see bash launch/quickstart.sh --help" >&2
    exit 2
    ;;
esac

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
RUN="$(realpath -m "${1:-$GLMV_REPO/runs/quickstart}")"
SEED="${2:-0}"
[[ "$SEED" =~ ^[0-9]+$ ]] || glmv_fail "the seed is a whole number, not '$SEED'"
[[ $# -le 2 ]] || glmv_fail "at most two arguments, run-dir and seed; see bash launch/quickstart.sh --help"
trap 'echo; echo "quickstart.sh: stopped; the same command goes on from here"; exit 130' INT TERM

SECONDS=0
glmv_environment ""
cd "$GLMV_REPO"
mkdir -p "$RUN" || glmv_fail "cannot make the run directory $RUN; give another one"
echo "run: $RUN   seed: $SEED"

# 1. mim: CogViT learns to fill in masked patches as two teachers see them. With no public teacher on this machine two
#    real ones are made: a small SigLIP image tower, trained here (semantics), and HOG features (texture).
glmv train --config experiments/cogvit_siglip.py:size=nano,role=teacher --workdir "$RUN/teacher" \
  --config.seed="$SEED"
glmv train --config experiments/cogvit_mim.py:size=nano --workdir "$RUN/mim" \
  --config.seed="$SEED" --config.teachers.semantic.path="$RUN/teacher"

# 2. siglip: images meet their names, in Chinese and English, at their own shapes and sizes.
glmv train --config experiments/cogvit_siglip.py:size=nano --workdir "$RUN/siglip" \
  --config.seed="$SEED" --config.init_from="$RUN/mim"

# 3. pretrain: the vision encoder meets the language model; next-token prediction and MMTP on packed rows.
glmv train --config experiments/vlm_pretrain.py:size=nano --workdir "$RUN/pretrain" \
  --config.seed="$SEED" --config.init_from="$RUN/siglip"

# 4. sft: questions and answers in the chat template, loss on the answers only.
glmv train --config experiments/vlm_sft.py:size=nano --workdir "$RUN/sft" \
  --config.seed="$SEED" --config.init_from="$RUN/pretrain"

# 5. rl: GRPO, the model's own answers graded by rules.
glmv train --config experiments/rl_grpo.py:size=nano --workdir "$RUN/rl" \
  --config.seed="$SEED" --config.init_from="$RUN/sft"

# The control: what the same wall time buys when it is spent on more SFT.
glmv train --config experiments/vlm_sft.py:size=nano,role=control --workdir "$RUN/sft_more" \
  --config.seed="$SEED" --config.init_from="$RUN/sft" --config.match_wall="$RUN/rl"

# The table on this terminal, and report.html with curves, pictures and answers.
glmv report "$RUN"
echo 'next, in README.md, "The half hour after it": talk to the model, teach it pictures of your own, compare'
printf 'total wall time of this call: %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
