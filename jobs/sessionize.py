"""Bring the sessions up to date.

Usage: spark-submit jobs/sessionize.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("sessionize", sys.argv[1:]))
