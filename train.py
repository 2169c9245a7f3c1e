"""Train and evaluate an experiment: `python train.py experiment=NAME`; `--help` lists them."""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from launch.errors import errors_past_hydra, run_reporting_errors
from launch.experiments import experiment_list
from launch.runs import run_folder

OmegaConf.register_new_resolver("experiment_list", experiment_list)
OmegaConf.register_new_resolver("sum", lambda numbers: sum(numbers.values() if hasattr(numbers, "values") else numbers))
OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True)  # names the time: one for the whole program


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    # Lightning takes many seconds to import, and help and typing errors do not need it.
    from launch.study import run_study

    with errors_past_hydra():
        run_study(config)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
