"""Check tonight's lists with the gates, and publish them if all gates pass.

Usage: spark-submit jobs/publish.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("publish", sys.argv[1:]))
