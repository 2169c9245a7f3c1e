"""Score, draw and film a checkpoint, for the tasks of its experiment or for a reward of your own.

    python evaluate.py ckpt_path=PATH [reward=EXPRESSION] [protocol=NAME] [episodes=10] [seconds=10]

PATH is a checkpoint, a run's folder, or `last`. EXPRESSION is written over the environment's named quantities, such as
"head_height < 1.1 and torso_upright > 0.9" or "tolerance(left_hand_height, 1.5, inf, 0.3)"; a wrong name lists them
all.
"""

import sys
import time
from pathlib import Path

import lightning as L
from omegaconf import OmegaConf

from callbacks.results import Films, Results, RewardCurves
from launch.errors import run_reporting_errors
from launch.recipes import find_checkpoint, rebuild
from launch.report import metrics_table
from launch.study import quieten

DEFAULTS = {
    "ckpt_path": None,  # what to evaluate
    "reward": None,  # an expression; None evaluates the experiment's own tasks
    "protocol": None,  # one of the experiment's ways to start episodes; None takes all
    "episodes": 10,
    "seconds": 10.0,  # length of the films
    "output_root": "outputs",
}


def main() -> None:
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(__doc__)
        return
    given = OmegaConf.from_cli(sys.argv[1:])
    if unknown := set(given) - set(DEFAULTS):
        raise ValueError(f"Unknown argument {sorted(unknown)[0]}: expected one of {', '.join(DEFAULTS)}.")
    config = OmegaConf.merge(DEFAULTS, given)
    if config.ckpt_path is None:
        raise ValueError("ckpt_path is missing: expected a checkpoint, a run's folder, or last.")
    quieten()
    path = find_checkpoint(config.ckpt_path, config.output_root)
    module, datamodule, recipe = rebuild(path)
    datamodule.choose_tasks(config.protocol, config.reward)
    datamodule.episodes = config.episodes
    print(f"Evaluating {path} ({recipe['experiment']}, {module.updates} updates).", flush=True)

    folder = Path(path).resolve().parent.parent / "evaluations" / time.strftime("%Y-%m-%d_%H-%M-%S")
    callbacks = [Results(folder), RewardCurves(folder), Films(folder, seconds=config.seconds)]
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    trainer.test(module, datamodule=datamodule, verbose=False)
    print(metrics_table(folder / "results.json"))
    print(folder)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
