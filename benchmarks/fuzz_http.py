"""Requests made from /openapi.json, right and wrong ones, against a gateway between scripted workers: how many, and what came.

    python -m benchmarks.fuzz_http [--examples 500] [--seed 0]

Each operation with a body gets that many right and that many wrong requests, each without one a quarter. The first answer that
is not as described, a 500, or a wait above 10 s ends the run with the request that caused it; at the end nothing may be held.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.gateway.cluster import cluster
from tests.gateway.model import write_model
from tests.hostile.http_fuzz import answer_everything, fuzz
from tests.support.redis import redis_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with redis_server() as url, tempfile.TemporaryDirectory() as folder:
        with cluster(url, write_model(Path(folder) / "model")) as one:
            answer_everything(one)
            began_s = time.monotonic()
            counts = fuzz(one, asked.examples, seed=asked.seed)
            one.check_idle()
            print(*counts.lines(), f"{time.monotonic() - began_s:.0f} s, nothing held at the end", sep="\n")


if __name__ == "__main__":
    main()
