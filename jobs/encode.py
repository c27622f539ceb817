"""Encode the items, with the encoders named by --model or with all encoders.

Usage: spark-submit jobs/encode.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("encode", sys.argv[1:]))
