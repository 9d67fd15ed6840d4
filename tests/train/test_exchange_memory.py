"""Memory of import and export by the system's own count, in a process of its own (benchmarks/checkpoint_exchange.py).

The model has 157 MB, its largest group of stacked tensors 101 MB, the largest tensor 4 MB. Allocators keep some of what
is freed, so half a group is asserted: what is measured is 10 to 40 MB.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

BENCHMARK = pathlib.Path(__file__).resolve().parent.parent.parent / "benchmarks" / "checkpoint_exchange.py"


def test_neither_way_holds_a_group_of_tensors(tmp_path):
    argv = [sys.executable, str(BENCHMARK), "--size", "small", "--folder", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["total"] > 140e6 and seen["group"] > 90e6 and seen["tensor"] < 5e6
    assert seen["import"]["peak"] < 0.5 * seen["group"] and seen["export"]["peak"] < 0.5 * seen["group"], seen
