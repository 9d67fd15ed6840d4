# shellcheck shell=bash
# A virtual environment with glmv_jax in it; sourced by quickstart.sh and test.sh.
#
#   source launch/install.sh
#   glmv_environment ""       # or an extra of pyproject.toml, such as dev
#
# The environment is .venv beside this folder (or $GLMV_VENV). It is made once, brought up to date when pyproject.toml
# changes, made again when it is broken, and first on PATH afterwards.

GLMV_REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
GLMV_VENV="${GLMV_VENV:-$GLMV_REPO/.venv}"

glmv_fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The first Python that exists, runs (a version manager's shim may not), is new enough and can make environments.
glmv_python() {
  local candidate
  for candidate in ${GLMV_PYTHON:-python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys, ssl, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

glmv_environment() {
  local extra="$1" python want stamps
  local target="$GLMV_REPO${extra:+[$extra]}"

  if ! "$GLMV_VENV/bin/python" -c 'import pip' >/dev/null 2>&1; then
    if [[ -e "$GLMV_VENV" && ! -f "$GLMV_VENV/pyvenv.cfg" && -n "$(ls -A "$GLMV_VENV" 2>/dev/null || echo file)" ]]; then
      glmv_fail "$GLMV_VENV exists and is no virtual environment; move it away or set GLMV_VENV to another folder"
    fi
    python="$(glmv_python)" || glmv_fail "no working Python 3.11 or 3.12 with venv found (on Debian and Ubuntu:" \
      "apt-get install python3.11 python3.11-venv); or set GLMV_PYTHON=/path/to/python"
    echo "environment: $GLMV_VENV ($("$python" --version))"
    "$python" -m venv --clear "$GLMV_VENV" || glmv_fail "could not make the environment $GLMV_VENV"
  fi

  # An extra holds the plain installation too, so the stamp of any extra serves for it.
  want="$("$GLMV_VENV/bin/python" - "$GLMV_REPO" <<'PY'
import hashlib, pathlib, sys
repo = pathlib.Path(sys.argv[1])
print(hashlib.sha256((repo / "pyproject.toml").read_bytes() + repr((repo, sys.version)).encode()).hexdigest())
PY
)"
  stamps=("$GLMV_VENV/glmv-installed-$extra"*)
  if ! grep --quiet --no-messages --line-regexp --fixed-strings "$want" "${stamps[@]}"; then
    echo "installing $target: a few minutes, once (and again when pyproject.toml changes)"
    "$GLMV_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target" ||
      glmv_fail "the installation stopped (see above); it needs the network and some GB of disk; then run this again"
    echo "$want" >"$GLMV_VENV/glmv-installed-$extra"
  fi
  export PATH="$GLMV_VENV/bin:$PATH"
}
