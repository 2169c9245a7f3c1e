"""Train and evaluate an experiment: `python train.py experiment=NAME`; `--help` lists them."""

import sys

from launch.errors import run_reporting_errors
from launch.program import main

if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
