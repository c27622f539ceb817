"""Ingest the landing of one night.

Usage: spark-submit jobs/ingest.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("ingest", sys.argv[1:]))
