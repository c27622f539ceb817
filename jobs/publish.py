"""Audit tonight's lists and publish them: spark-submit jobs/publish.py --run-date 2010-12-09 --env
cluster.
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("publish", sys.argv[1:]))
