"""Make the candidate lists of the models named by --model, or of all models.

Usage: spark-submit jobs/recommend.py --run-date 2010-12-09 --env cluster
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("recommend", sys.argv[1:]))
