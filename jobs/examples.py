"""Build the examples that rankers learn from, for the rankers named by --model or for all.

Usage: spark-submit jobs/examples.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("examples", sys.argv[1:]))
