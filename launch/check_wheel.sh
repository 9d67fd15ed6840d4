#!/usr/bin/env bash
# Builds the wheel, installs it with the core alone into an environment of its own, and uses it as a stranger would, in an
# empty folder: glmv --help, one step of stage 1, and what is said of each extra that is not there. Needs the network.
#
#   bash launch/check_wheel.sh [folder]        (default: a temporary one, which is removed)
set -euo pipefail

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
esac

# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
PYTHON="$(glmv_python)" || glmv_fail "no working Python 3.11 or 3.12 with venv found; or set GLMV_PYTHON"
if [[ -n "${1:-}" ]]; then
  mkdir -p "$1"
  PLACE="$(realpath "$1")"
else
  PLACE="$(mktemp -d)"
  trap 'rm -rf "$PLACE"' EXIT
fi
[[ -z "$(ls -A "$PLACE")" ]] || glmv_fail "$PLACE is not empty; give another folder"

"$PYTHON" -m venv "$PLACE/venv"
VENV="$PLACE/venv/bin"
"$VENV/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$PLACE" "$GLMV_REPO"
"$VENV/python" -m pip install --quiet --disable-pip-version-check "$PLACE"/*.whl
echo "wheel: $(basename "$PLACE"/*.whl), $(du -h "$PLACE"/*.whl | cut -f1)"

mkdir "$PLACE/empty"
cd "$PLACE/empty"
unset PYTHONPATH
"$VENV/glmv" --help >help.txt
"$VENV/glmv" train --config experiments/cogvit_mim.py:size=nano,semantic=false --workdir run --config.steps=1
[[ -s run/results.json ]] || glmv_fail "a step of stage 1 left no results.json"
echo "one step of stage 1 from the experiments that the wheel brings"

# says EXTRA COMMAND...: the command fails in one line that names the extra.
says() {
  local extra="$1" said
  shift
  if said="$("$@" 2>&1)"; then glmv_fail "without the extra $extra this did not fail: $*"; fi
  said="$(tail -n 1 <<<"$said")"
  [[ "$said" == *"glmv_jax[$extra]"* ]] || glmv_fail "without the extra $extra this does not name it: $said"
  echo "$extra: $said"
}
touch pairs.parquet
says serve "$VENV/glmv" serve --checkpoint run
says hf "$VENV/glmv" import-hf nobody/nothing imported
says data "$VENV/glmv" train --config experiments/cogvit_siglip.py:size=nano,sources=a --workdir a \
  --config.data.sources.a.path=pairs.parquet
says rl "$VENV/python" -c 'from glmv_jax.rl import envs; envs.FAMILIES["gymnasium"]("FrozenLake-v1", "train", 0)'
says tpu "$VENV/glmv" compile --config experiments/cogvit_mim.py:size=nano,semantic=false --topology v5e:2x2
echo "the wheel is sound"
