"""Score, draw and film a checkpoint: `python evaluate.py ckpt_path=PATH`; `--help` says what else."""

from launch.errors import leave, run_reporting_errors
from launch.evaluation import main

if __name__ == "__main__":
    leave(run_reporting_errors(main))
