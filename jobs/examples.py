"""Make what rankers learn from (--model NAME, or all of them): spark-submit jobs/examples.py
--run-date 2010-12-09 --env cluster.
"""

import sys

from recspark.pipeline.job import run_job

if __name__ == "__main__":
    sys.exit(run_job("examples", sys.argv[1:]))
