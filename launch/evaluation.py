"""Score, draw and film a checkpoint, for the tasks of its experiment or for a reward of your own.

    python evaluate.py ckpt_path=PATH [reward=EXPRESSION] [protocol=NAME] [episodes=10] [seconds=10, of the films]
        [threads=N] [trust=PACKAGE,...] [data_root=data] [output_root=outputs, where `last` is looked for]

PATH is a checkpoint, a run's folder, or `last`. EXPRESSION is written over the environment's named quantities, such as
"head_height < 1.25 and torso_upright > 0.9" or "tolerance(left_hand_height, 1.5, inf, 0.3)"; a wrong name lists them
all. A checkpoint of classes outside of this project, your own, is only rebuilt if their package is trusted by name.
Data sets that the evaluation needs and does not find are only made in data_root.
"""

import shlex
import sys
from contextlib import suppress
from typing import Any, get_args

import lightning as L
import torch

from callbacks.results import Films, Results, RewardCurves
from components.checks import Positive, Size, check_range
from components.wording import counted
from launch.errors import CommandLineError
from launch.files import write_json
from launch.overrides import command, program
from launch.recipes import find_checkpoint, find_checkpoints, rebuild, study_of
from launch.report import write_evaluation
from launch.runs import check_inside, new_folder, remove_empty_folders
from launch.stops import leave_signals, stopping_at_once
from launch.study import quieten

DEFAULTS = {
    "ckpt_path": None,  # what to evaluate
    "reward": None,  # an expression; None evaluates the experiment's own tasks
    "protocol": None,  # one of the experiment's ways to start episodes; None takes all
    "episodes": 10,
    "seconds": 10.0,  # length of the films
    "threads": None,  # of PyTorch; None leaves the number to it
    "trust": None,  # packages outside of the project that may be called on the checkpoint's word, by commas
    "data_root": "data",  # the only folder, but that of the run, that is written to
    "output_root": "outputs",
}
NUMBERS = {"episodes": Size, "seconds": Positive, "threads": Size}


def parse(arguments: list[str]) -> dict[str, Any]:
    """The arguments key=value over their defaults, numbers where the default is one.

    Raises:
        CommandLineError: an argument is unknown, malformed or missing.
    """
    given = dict(DEFAULTS)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in DEFAULTS:
            raise CommandLineError(
                f"Unknown argument {argument}: expected key=value, key one of {', '.join(DEFAULTS)}."
            )
        if not text and key != "ckpt_path":
            raise CommandLineError(f"{key}=: expected a value, found none.")
        given[key] = text if key not in NUMBERS else _number(key, text)
    if not given["ckpt_path"]:
        raise CommandLineError("ckpt_path is missing: expected a checkpoint, a run's folder, or last.")
    return given


def _number(key: str, text: str) -> float:
    kind = get_args(NUMBERS[key])[0]
    value: Any = text
    with suppress(ValueError):
        value = kind(text)
    try:
        check_range(key, value, NUMBERS[key])
    except ValueError as error:
        raise CommandLineError(str(error)) from error
    return value


def main() -> None:
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(__doc__.replace("python evaluate.py", program("evaluate")))
        return
    given = parse(sys.argv[1:])
    quieten()
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    path = find_checkpoint(given["ckpt_path"], given["output_root"])
    beside = path.resolve().parent
    run = beside.parent if beside.name == "checkpoints" else beside
    check_inside(run / "evaluations", run)
    trust = tuple(given["trust"].split(",")) if given["trust"] else ()
    module, datamodule, recipe = rebuild(path, trust, given["data_root"])
    datamodule.choose_tasks(given["protocol"], given["reward"])
    datamodule.episodes = given["episodes"]
    print(f"Evaluating {path} ({recipe['experiment']}, {counted(module.updates, 'update')}).", flush=True)
    study = study_of(path)
    others = [] if study is None else [other for other in find_checkpoints(study) if other != path.resolve()]
    if others:
        another = shlex.quote(f"ckpt_path={others[0]}")
        print(
            f"The study has {counted(len(others), 'more checkpoint')}, to be evaluated by name, as in {another}",
            flush=True,
        )

    folder = new_folder(run / "evaluations")
    callbacks = [RewardCurves(folder), Films(folder, seconds=given["seconds"]), Results(folder)]
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
    leave_signals(trainer)
    try:
        with stopping_at_once():
            trainer.test(module, datamodule=datamodule, verbose=False)
    finally:
        remove_empty_folders()
    write_json(folder / "evaluation.json", {**given, "ckpt_path": str(path)})
    whole = {**given, "ckpt_path": path.resolve()}
    arguments = [f"{key}={value}" for key, value in whole.items() if value != DEFAULTS[key]]
    title = f"{recipe['experiment']} after {counted(module.updates, 'update')}"
    rewards = getattr(datamodule, "rewards", {})  # language models and images have none
    print(write_evaluation(title, command("evaluate", arguments, trust), rewards, folder))
    print(folder)
