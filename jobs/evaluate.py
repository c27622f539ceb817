"""Evaluate the lists of the backtest, and the lists that were published one horizon ago.

Usage: spark-submit jobs/evaluate.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", sys.argv[1:]))
