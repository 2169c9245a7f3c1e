"""Score, draw and film a checkpoint: `python evaluate.py ckpt_path=PATH`; `--help` says what else."""

import sys

from launch.errors import run_reporting_errors
from launch.evaluation import main

if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
