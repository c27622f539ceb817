"""`python -m benchmarks [--smoke] [NAME ...]`: run the benchmarks, all or those named."""

from __future__ import annotations

import argparse
import importlib
import os
import time

# One thread for each process that computes, as in the executors; before numpy is imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

NAMES = (
    "kernels",
    "als",
    "topn",
    "item2vec",
    "words",
    "training",
    "retail",
    "nights",
    "plain_night",
    "evaluation_memory",
    "trees_memory",
    "ranking",
    "quality.movielens",
    "quality.plain",
    "quality.movielens_last",
    "quality.movielens_time",
    "quality.movielens_next",
    "quality.movielens_cold",
    "quality.movielens_pairs",
    "quality.retail_cold",
    "quality.retail_vectors",
    "quality.movielens_towers",
    "quality.movielens_views",
    "quality.sessions",
    "quality.wikipedia",
    "quality.cdl",
    "quality.clicks",
    "quality.spoken_digits",
    "quality.posters",
    "media",
    "topn_memory",  # the last: in smoke mode it ends the session that the others share
)
# Nights of minutes; tests/e2e/test_nights_in_turn.py does the same.
NO_SHORT_FORM = ("nights",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown benchmark {sorted(unknown)}; there are {', '.join(NAMES)}")
    short = [name for name in NAMES if name not in NO_SHORT_FORM]
    for name in arguments.names or (short if arguments.smoke else NAMES):
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        importlib.import_module(f"benchmarks.{name}").run(smoke=arguments.smoke)
        print(f"== {name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
