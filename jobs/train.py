"""Fit the models named by --model, or all models.

Usage: spark-submit jobs/train.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", sys.argv[1:]))
