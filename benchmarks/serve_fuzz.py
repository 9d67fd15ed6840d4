"""Does the server do as /openapi.json says, whatever is sent?

    python benchmarks/serve_fuzz.py [--cases 1000] [--seed 0] [--out FILE]

A real server, whose small model says a few words, gets --cases requests of every operation that its description allows
and as many that it forbids, made by schemathesis. No reply may be a 5xx; each has a status, a type, headers and a body
that are described; and what is forbidden is refused. Prints a table of statuses, and of each operation that fails the
smallest request that does. Exits with 1 then.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the path of one operation")
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import requests
    from contest import environment, save

    from tests.serving import held, parrot

    rows, failed, start = {}, {}, time.monotonic()
    with parrot.running() as bird, requests.Session() as session:
        bird.say("a red heart")
        for operation in held.OPERATIONS:
            if args.only not in (None, operation.path):
                continue
            for mode in held.modes(operation):
                name = f"{operation.method.upper()} {operation.path}, {mode}"
                # Where nothing varies there is little to send.
                cases = args.cases if len(held.modes(operation)) > 1 else min(20, args.cases)
                try:
                    rows[name] = dict(held.hold(bird.url, session, operation, mode, cases, args.seed))
                    print(f"{name}: {rows[name]}", flush=True)
                except (Exception, BaseExceptionGroup) as error:  # whatever it is; the next one is asked all the same
                    failed[name] = str(error)[:4000]
                    print(f"{name}: WRONG\n{failed[name]}", flush=True)
        left = bird.answers.running
    print(f"{sum(sum(found.values()) for found in rows.values())} requests in {time.monotonic() - start:.0f} s, "
          f"{len(failed)} operations failed; {left} answers are running still")  # fmt: skip
    save({"benchmark": "serve_fuzz", "cases": args.cases, "seed": args.seed, "statuses": rows, "failed": failed,
          "left_running": left, "environment": environment()}, args.out)  # fmt: skip
    return int(bool(failed or left))


if __name__ == "__main__":
    sys.exit(main())
