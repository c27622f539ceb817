"""Merge new acts into the histories, and build the features as of both cutoffs.

Usage: spark-submit jobs/build_features.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("build_features", sys.argv[1:]))
