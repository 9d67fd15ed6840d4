"""`python -m glmv_jax.cli` is the command `glmv`."""

import sys

from glmv_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
