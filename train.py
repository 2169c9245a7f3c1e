"""Train and evaluate an experiment: `python train.py experiment=NAME`; `--help` lists them."""

from launch.errors import leave, run_reporting_errors
from launch.program import main

if __name__ == "__main__":
    leave(run_reporting_errors(main))
