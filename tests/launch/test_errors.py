"""Bad input gets one sentence and an exit code, and nothing that was there is lost."""

import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from callbacks.run_log import read_rows
from launch import errors
from launch.arms import Run
from launch.checkpoints import AtomicCheckpointIO, load_checkpoint
from launch.errors import _report
from launch.files import write_json
from launch.finished import check_finished
from launch.runs import locked

ROOT = Path(__file__).resolve().parents[2]
RUN = "fb_aw_narrow/seed_0"
CHECKPOINT = f"{RUN}/checkpoints/last.ckpt"
ABOUT = {"experiment": "x", "study": None, "spec": {}}  # what else a recipe says


def assert_one_sentence(finished, code, *parts):
    """One line on stderr, whatever was announced before it."""
    assert finished.code == code, finished.err
    assert finished.err.count("\n") == 1, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.endswith(". (TENFOLD_TRACEBACK=1 shows where.)\n") or "? (TENFOLD" in finished.err
    assert ".." not in finished.err.replace("...", "").replace("../", "")
    for part in parts:
        assert part in finished.err, finished.err
    assert not re.search(r"([?!:;,]|(?<!\.)\.)\. \(TENFOLD", finished.err), finished.err
    assert len(finished.err) < 2100


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["Which experiment? Add experiment=NAME", "fb_overdrive", "--help"]),
        (["experiment=fb_overdriv"], ["Unknown experiment=fb_overdriv: expected one of ", "such as fb_overdrive"]),
        (["experiment=fb_overdrive", "module.updaets=3"], ["Unknown key module.updaets", "mean module.updates?"]),
        (["experiment=fb_overdrive", "modul.features=3"], ["Unknown key modul.features", "mean module.features?"]),
        (["experiment=fb_overdrive", "module.updates"], ["Can't read module.updates: expected key=value"]),
        (["experiment=fb_overdrive", "protocols=[1"], ["Can't read protocols=[1: expected key=value"]),
        (["experiment=fb_overdrive", "trainer=foo"], ["Unknown option trainer/foo", "cpu, ddp, fsdp, gpu"]),
        (["experiment=fb_overdrive", "module/objective=foo"], ["Unknown option module/objective/foo"]),
        (["experiment=fb_overdrive", "arms=foo"], ["arms=foo: expected null, or arms with lists of overrides"]),
        (["experiment=fb_overdrive", "arms=[a]"], ["Error merging override arms=[a]: Cannot merge DictConfig with Li"]),
        (["experiment=fb_overdrive", "arms={}"], ["arms={}: expected null, or keys one by one"]),
        (
            ["experiment=fb_overdrive", "datamodule.protocols={}"],
            ["datamodule.protocols={}: expected null, or keys one by one"],
        ),
        (["experiment=fb_overdrive", "+arms.x=[5]"], ["arms.x=[5]: expected null, or a list of overrides"]),
        (
            ["experiment=fb_overdrive", "+arms.x=['modul.updates=3']"],
            ["arms.x: ", "found modul.updates. Did you mean module."],
        ),
        (["experiment=fb_overdrive", "hydra.run.dir="], ["hydra.run.dir: expected a folder of the run's own, found"]),
        (["experiment=fb_overdrive", "arm=x"], ["arm: expected nothing, for the program sets it"]),
        (
            [
                "experiment=gpl_cheetah",
                "environment=gymnasium",
                "environment.id=Pendulum-v1",
                "environment.domain=walker",
            ],
            ["environment.domain: expected what environment takes here, one of episode_length, id, options, wrappers,"],
        ),
        (["experiment=fb_overdrive", "+arms.x=seed"], ["arms.x=seed: expected null, or a list of overrides such as ["]),
        (
            ["experiment=fb_overdrive", f"+arms.x=[{'x' * 30000}"],
            [
                f"Can't read +arms.x=[{'x' * 1500}",
                "x ... x",
                "xxx: expected the overrides of an arm in quotes, as in '+",
            ],
        ),
        (
            ["experiment=fb_overdrive", "+arms.x=[module.updates=5]"],
            ["expected the overrides of an arm in quotes, as in"],
        ),
        (["experiment=fb_overdrive", "~arms.fb_ful"], ["~arms.fb_ful: Unknown key", "Did you mean arms.fb_full?"]),
        (
            ["experiment=gpl_cheetah", "environment.skip=2"],
            ["expected one of domain, task, action_repeat in env", "in environment."],
        ),
        (
            ["experiment=gpl_pendulum", "arms=null", "+arms.x=['modul.updates=3']"],
            ["arms.x: expected keys of this experiment, found modul.updates. Did you mean module.updates?"],
        ),
        (["experiment=fb_overdrive", "seed=1,2"], ["Ambiguous value for argument 'seed=1,2': 1. To use it as a list"]),
        (["experiment=fb_overdrive", "datamodule.seed=${no}"], ["datamodule.seed: Interpolation key 'no' not found"]),
        (["experiment=fb_overdrive", "hydra.searchpath=[no]"], ["hydra.searchpath: expected a folder or package of"]),
        (["experiment=fb_overdrive", "hydra.searchpath=[pkg://no]"], ["hydra.searchpath: expected a folder or pack"]),
        (["experiment=fb_overdrive", "module=[1]"], ["module=[1]: expected the name of an option of module"]),
        (["experiment=fb_overdrive", "trainer=null"], ["trainer=null: expected the name of an option of trainer"]),
        (
            ["experiment=drr_digits", "module.code_model_learning_rate=1"],
            [
                "only the arm codec has it, for which it is typed as 'arms.codec=[",
                '"module.code_model_learning_rate=VAL',
            ],
        ),
        (
            ["experiment=drr_digits", "datamodule.view=raw"],
            ["datamodule.view: what is typed holds for all arms, and the arm codec has no such key"],
        ),
    ],
)
def test_wrong_command_lines(program, arguments, parts):
    assert_one_sentence(program(*arguments), 2, *parts)


def test_results_of_other_settings_are_not_kept_unnoticed(program, one_arm, tmp_path):
    began = program(*one_arm, f"output_root={tmp_path}", "module.updates=5")
    assert began.code == 0, began.err
    again = ("experiment=fb_overdrive", f"ckpt_path={began.folder}")
    finished = program(*again, "module.discount=0.5")
    parts = ["fb_aw_narrow, seed 0 is finished: expected module.discount=", "found 0.5; start anew without ckpt_path"]
    assert_one_sentence(finished, 1, *parts)
    assert program(*again).code == 0


def test_results_of_other_settings_are_named_by_the_keys_that_set_them(tmp_path):
    module = {"updates": 1, **{f"rate_{number}": "${rate}" for number in range(9)}}
    config = OmegaConf.create({"rate": 1, "module": module, "datamodule": {}})
    run = Run("arm", 0, tmp_path / "arm" / "seed_0")
    recipe = OmegaConf.to_container(config, resolve=True)
    write_json(run.results, {"updates": 1, "seconds": 1.0, "metrics": {}, "recipe": {**recipe, **ABOUT}})
    config.rate = 2
    with pytest.raises(ValueError, match=r"^arm, seed 0 is finished: expected rate=1, with which it was run, found 2;"):
        check_finished([run], [], {run: config})


def test_results_that_others_are_made_of_stay(tmp_path):
    runs = [Run(arm, 0, tmp_path / arm / "seed_0") for arm in ("codec", "classifier")]
    configs = {runs[0]: {"updates": 2}, runs[1]: {"updates": 1, "weights": f"{runs[0].folder}/codec.safetensors"}}
    configs = {run: OmegaConf.create({"module": module, "datamodule": {}}) for run, module in configs.items()}
    for run in runs:
        recipe = OmegaConf.to_container(configs[run])
        write_json(run.results, {"updates": 1, "seconds": 1.0, "metrics": {}, "recipe": {**recipe, **ABOUT}})
    check_finished(runs, [], configs)
    with pytest.raises(ValueError, match="codec, seed 0 would go on beyond what classifier was made with"):
        check_finished(runs, runs[:1], configs)
    moved = [Run(run.arm, 0, tmp_path / "moved" / run.arm / "seed_0") for run in runs]
    shutil.copytree(tmp_path / "codec", tmp_path / "moved" / "codec")
    shutil.copytree(tmp_path / "classifier", tmp_path / "moved" / "classifier")
    configs = dict(zip(moved, configs.values()))
    configs[moved[1]].module.weights = f"{moved[0].folder}/codec.safetensors"
    check_finished(moved, [], configs)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["module.updates=many"], 1, ["module.updates=many: expected a whole number"]),
        (["module.discount=high"], 1, ["module.discount=high: expected a number"]),
        (["datamodule.batch_size=0.5"], 1, ["datamodule.batch_size=0.5: expected a whole number"]),
        (["+module.zip=3"], 2, ["module.zip: ", "unexpected keyword argument 'zip'"]),
        (["mixing=alix"], 2, ["module.encoder: ", "unexpected keyword argument 'encoder'"]),
        (["module.updates=122"], 1, ["module.updates=122 is no multiple of datamodule.updates_per_step=5"]),
        (
            ["datamodule.protocols.goals.rewards=[top]"],
            1,
            ["datamodule.protocols.goals.rewards: Unknown task 'top' of overdrive: expected one of"],
        ),
        (
            ["+datamodule.protocols.goals.num=3"],
            1,
            ["datamodule.protocols.goals.num: expected what OverdriveEnv takes ("],
        ),
        (
            ["+datamodule.protocols.x={start: 1}"],
            1,
            ["datamodule.protocols.x: expected rewards, a list or expressions"],
        ),
        (
            ["datamodule.protocols.goals.rewards=3"],
            1,
            ["datamodule.protocols.goals: expected rewards, a list or expressions by their names, found rewards=3"],
        ),
        (["datamodule.protocols.goals.rewards=[1]"], 1, ["found rewards=[1]"]),
        (
            ["+datamodule.reward=null", "+datamodule.protocols.x={rewards: ['${datamodule.reward}']}"],
            1,
            ["datamodule.reward=null: expected a task or an expression, found null"],
        ),
        (["callbacks.results.folder=3"], 1, ["callbacks.results.folder=3: expected a text or a path"]),
        (["module.learning_rate=1e30"], 1, ["module.learning_rate=1e+30: expected at most 100"]),
        (["threads=0"], 1, ["threads=0"]),
        (["threads=abc"], 1, ["threads=abc: expected a whole number or null"]),
        (["seed=abc"], 1, ["seed=abc: expected a whole number"]),
        (["seed=[0,1]"], 1, ["seed=[0, 1]: expected a whole number"]),
        (["seed=-1"], 1, ["seed=-1: expected at least 0"]),
        (["seed=4294967295", "num_seeds=2"], 1, ["seed + num_seeds - 1=4294967296: expected at most 4294967295"]),
        (["num_seeds=1.5"], 1, ["num_seeds=1.5: expected a whole number"]),
        (["num_seeds=true"], 1, ["num_seeds=True: expected a whole number"]),
        (["training_curves=null"], 1, ["training_curves=null: expected a list, each of it a text"]),
        (["training_curves=abc"], 1, ["training_curves=abc: expected a list, each of it a text"]),
        (["contrasts=3"], 1, ["contrasts=3: expected KEY: VALUE pairs"]),
        (["+contrasts.x=[1]"], 1, ["contrasts.x=[1]: expected ARM: WEIGHT pairs, as in {ARM: 1, OTHER: -1}."]),
        (["+contrasts.x={a: abc}"], 1, ["contrasts.x.a=abc: expected a number"]),
        (["+contrasts.x={a: nan}"], 1, ["contrasts.x.a=nan: expected a finite number"]),
        (["training_curves=[1]"], 1, ["training_curves=[1]: expected a list, each of it a text"]),
        (["output_root=null"], 1, ["output_root=None: expected the path of a folder"]),
        (["output_root="], 1, ["output_root='': expected the path of a folder"]),
        (["name=../../x"], 1, ["name='../../x': expected a name for a folder in that of the runs"]),
        (["name=."], 1, ["name='.': expected a name for a folder in that of the runs"]),
        (["data_root="], 1, ["data_root='': expected the path of a folder"]),
        (["+trainer.fast_dev_run=true"], 1, ["trainer.fast_dev_run=True: expected null"]),
        (["+trainer.max_time=00:00:01:00"], 1, ["trainer.max_time=00:00:01:00: expected null"]),
        (["+trainer.max_steps=5"], 1, ["trainer.max_steps=5: expected -1"]),
        (["+trainer.limit_test_batches=1"], 1, ["trainer.limit_test_batches=1: expected null"]),
        (["module.forward_map._partial_=5"], 1, ["module.forward_map._partial_: expected true or false, found 5"]),
        (
            ["module.forward_map._partial_=null"],
            1,
            ["module.forward_map._partial_: expected true or false, found noth"],
        ),
        (["+arms={../x: []}"], 1, ["arms='../x': expected a name for a folder"]),
        (["+arms.late=['threads=abc']"], 1, ["threads=abc: expected a whole number or null"]),
        (["+arms.late=['module.discount=abc']"], 1, ["module.discount=abc: expected a number"]),
        (["environment=gymnasium", "environment.id=Pendulm-v1"], 1, ["=Pendulm-v1: ", "Did you mean: `Pendulum`? (T"]),
        (["ckpt_path="], 2, ["ckpt_path=: expected last, a run's folder or a checkpoint in one, found nothing"]),
        (["ckpt_path=3"], 1, ["ckpt_path=3: expected a run's folder or a checkpoint in one, found nothing"]),
        (["module.forward_map._target_=components.Nope"], 1, ["module.forward_map._target_=components.Nope: expected"]),
        (
            ["module.forward_map={a: 1}"],
            2,
            ["module.forward_map can't be replaced as a whole", "+module.forward_map.N", "_target_=CLASS"],
        ),
        (["trainer.accelerator=gpu"], 1, ["trainer: ", "gpu"]),
        (["ckpt_path=last"], 1, ["ckpt_path=last: expected a run of fb_overdrive in", "found none"]),
        (["ckpt_path=nowhere.ckpt"], 1, ["ckpt_path=nowhere.ckpt: expected a run's folder or a checkpoint"]),
        (["ckpt_path=README.md"], 1, ["ckpt_path=README.md: expected a run's folder or a checkpoint"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case asks for a GPU that is not there")
def test_wrong_settings_leave_no_folder_behind(program, one_arm, tmp_path, arguments, code, parts):
    assert_one_sentence(program(*one_arm, f"output_root={tmp_path}/own/outputs", *arguments), code, *parts)
    assert not list(tmp_path.iterdir())


def test_settings_that_nothing_takes_are_named(program, tmp_path):
    finished = program("experiment=gpl_cheetah", "mixing=alix", f"output_root={tmp_path}")
    expected = "module.encoder.mixing: expected what FlatObservations takes (one of observation_shape), found mixing"
    assert_one_sentence(finished, 1, expected)


@pytest.fixture(scope="module")
def half(program, one_arm, tmp_path_factory):
    """A run with more updates to go."""
    finished = program(*one_arm, f"output_root={tmp_path_factory.mktemp('half')}", "module.updates=40")
    assert finished.code == 0
    return finished.folder


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(program, folder, arguments, *parts):
    before = files(folder)
    finished = program("experiment=fb_overdrive", f"ckpt_path={folder}", "module.updates=60", *arguments)
    assert_one_sentence(finished, 1, *parts)
    assert files(folder) == before


@pytest.fixture
def copy(half, tmp_path):
    return shutil.copytree(half, tmp_path / "fb_overdrive" / half.name)


def test_checkpoint_of_other_sizes(program, half):
    path = half / CHECKPOINT
    assert_refused(
        program, half, ["module.features=32"], f"ckpt_path={path}: The checkpoint's forward_map", "expected ["
    )


def test_checkpoint_of_another_method(program, copy):
    checkpoint = load_checkpoint(copy / CHECKPOINT)
    checkpoint["learning_method"]["class"] = "Other"
    AtomicCheckpointIO().save_checkpoint(checkpoint, copy / CHECKPOINT)
    assert_refused(program, copy, [], "The checkpoint holds Other, expected ForwardBackward")


def test_damaged_checkpoint(program, copy):
    path = copy / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(program, copy, [], f"ckpt_path={path}: expected a whole checkpoint, found a damaged or foreign file")
    finished = program("experiment=fb_overdrive", f"ckpt_path={path}")
    assert_one_sentence(finished, 1, f"ckpt_path={path}: expected a whole checkpoint")


def test_run_of_another_experiment(program, half):
    finished = program("experiment=fb_humanoid", f"ckpt_path={half}")
    assert_one_sentence(finished, 1, "expected a run of experiment=fb_humanoid, found one of experiment=fb_overdrive")


def test_settings_that_failed_are_not_remembered(program, copy):
    assert program("experiment=fb_overdrive", f"ckpt_path={copy}", "module.updates=62").code == 1
    assert program("experiment=fb_overdrive", f"ckpt_path={copy}").code == 0


def test_a_resumption_that_is_refused_late_changes_nothing(program, copy):
    """The data are made and compared when the folder has been written to already."""
    header, _ = read_rows(copy / RUN / "train.csv")
    with open(copy / RUN / "train.csv", "a") as file:
        file.write(f"45,0,1.2{',' * (len(header) - 3)}\n")  # of after the checkpoint
    said = "datamodule.dataset: expected the data that the checkpoint's run was trained on, found others"
    assert_refused(program, copy, ["datamodule.dataset.episodes=21"], said)
    assert program("experiment=fb_overdrive", f"ckpt_path={copy}", "module.updates=60").code == 0
    assert [int(row["updates"]) for row in read_rows(copy / RUN / "train.csv")[1]] == list(range(5, 61, 5))


def test_diverging_run_keeps_its_last_good_checkpoint(program, copy, monkeypatch):
    arguments = ["experiment=fb_overdrive", f"ckpt_path={copy}", "module.updates=120"]
    steep = "lightning_modules.base.LearningMethod.learning_rate_factors"
    monkeypatch.setattr(steep, lambda self: [1e30] * len(self.configure_optimizers()))
    assert_one_sentence(program(*arguments), 1, "train/", "by update", "no checkpoint was taken of it")
    assert load_checkpoint(copy / CHECKPOINT)["learning_method"]["updates"] == 40
    monkeypatch.undo()
    sound = program(*arguments)
    assert sound.code == 0
    assert "resuming after 40 updates" in sound.out


def test_traceback_is_shown_when_asked_for(program, one_arm, tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"module\.updates=122 is no multiple") as raised:
        program(*one_arm, f"output_root={tmp_path}", "module.updates=122")
    assert str(raised.value.__cause__).startswith("updates=122 is no multiple")
    assert "launch.errors._Escaped" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_memory_that_is_not_there_is_one_sentence(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        allocate(2**57)
    code, sentence = _report(raised.value)
    assert code == 1
    assert re.fullmatch(
        r"Out of memory \(([Tt]ried|Unable) to allocate [\d.]+ \w+\): smaller networks, .* take less\.", sentence
    )


def test_what_reads_no_further_is_one_sentence():
    assert _report(BrokenPipeError(32, "Broken pipe")) == (
        1,
        "a file or pipe: expected to read or write it, found: Broken pipe.",
    )


def test_memory_that_python_itself_is_refused_is_one_sentence():
    assert _report(MemoryError()) == (
        1,
        "Out of memory: smaller networks, batches or numbers of environments take less.",
    )


@pytest.mark.parametrize("also", [True, False])
def test_of_several_processes_the_first_says_what_all_are_refused_for(monkeypatch, tmp_path, also):
    """Lightning kills the first as soon as another has failed: the others wait, and speak where it does not end."""

    def refused():
        raise ValueError("x=1: expected 2.")

    monkeypatch.setattr(errors, "PATIENCE", 20.0 if also else 0.2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    reading, writing = os.pipe()
    if os.fork() == 0:  # the first process
        if os.fork() == 0:
            with open(tmp_path / "err", "w") as sys.stderr:
                code = errors.run_reporting_errors(refused)
            os.write(writing, bytes([code]))
            os._exit(0)
        if not also:
            os.read(reading, 0)
            time.sleep(10)
        time.sleep(0.2)
        os._exit(1)
    assert os.read(reading, 1) == b"\x01"
    assert ("x=1: expected 2." in (tmp_path / "err").read_text()) is not also


def test_two_programs_are_not_at_one_run(program, half):
    with locked(half):
        assert_refused(program, half, [], f"{half}: expected a run that no program is at work on, found one")


def test_a_link_that_leads_nowhere_does_not_start_training_over(program, copy):
    (copy / CHECKPOINT).unlink()
    (copy / CHECKPOINT).symlink_to(copy / "gone.ckpt")
    assert_refused(program, copy, [], f"{copy / CHECKPOINT}: expected a checkpoint, found a link that leads nowhere")


def test_a_folder_that_is_a_link_out_of_the_run_is_not_written_to(program, copy, tmp_path):
    (copy / RUN).rename(tmp_path / "elsewhere")
    (copy / RUN).symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    expected = f"{copy / RUN}: expected a folder in {copy}, found a link to {tmp_path / 'elsewhere'}."
    assert_refused(program, copy, [], expected)
    assert files(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("when", ["build", "train"])
def test_a_stop_says_how_to_go_on_once_there_is_something_to_go_on_with(program, one_arm, tmp_path, monkeypatch, when):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"launch.study.{when}", stop)
    finished = program(*one_arm, f"output_root={tmp_path}")
    assert finished.code == 130
    folders = list(tmp_path.glob("fb_overdrive/*"))
    if when == "build":
        assert (finished.err, folders) == ("Stopped. Nothing was written.\n", [])
        assert "Writing to" not in finished.out
        assert not list(tmp_path.iterdir())
    else:
        (folder,) = folders
        assert finished.err == f"Stopped. Go on with: python train.py ckpt_path={folder}\n"
        assert f"Writing to {folder}\n" in finished.out
        monkeypatch.undo()
        assert program(f"ckpt_path={folder}", "module.updates=5").code == 0


def test_last_says_that_a_newer_folder_has_nothing_to_go_on_with(program, copy):
    empty = copy.parent / "2999-01-01_00-00-00-000000"
    empty.mkdir()
    finished = program("experiment=fb_overdrive", f"output_root={copy.parents[1]}", "ckpt_path=last")
    assert finished.out.startswith(f"ckpt_path=last: {empty} has nothing to go on with; the run before is {copy}.\n")
    assert finished.folder == copy


@pytest.mark.parametrize(
    ("package", "overrides", "expected"),
    [
        (
            "peft",
            ["experiment=svf_larger", "arms=null", "adapter=lora"],
            "the package peft (make install, or pip install one of this project's extras)",
        ),
        (
            "constriction",
            ["experiment=drr_digits"],
            "the package constriction (make install, or pip install one of this project's extras)",
        ),
    ],
)
def test_experiments_that_need_more_packages_name_them(package, overrides, expected, tmp_path, language_folder):
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv[0] = 'train.py'\n"
        "import train\n"
        "sys.exit(train.run_reporting_errors(train.main))\n"
    )
    if package != "constriction":
        overrides = [*overrides, "language_model=folder", f"language_model.path={language_folder}"]
    finished = subprocess.run(
        [sys.executable, "-c", program, *overrides, f"output_root={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1, finished.stderr
    assert f"expected {expected}, found none" in finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert "Error" not in finished.stdout
