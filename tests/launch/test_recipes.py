"""What a checkpoint may have built on its word, and what it may not."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from launch.checkpoints import AtomicCheckpointIO
from launch.experiments import CONFIGS
from launch.recipes import (
    FOLDERS,
    LOOK_UPS,
    RUN_FOLDERS,
    check_recipe,
    check_targets,
    check_writes,
    foreign_packages,
    rebuild,
)
from launch.runs import write_overrides

OF_RUNS = ("callbacks.", "launch.", "lightning.")  # not of what is learned


def named(node: object) -> set[str]:
    """What the files of the configuration call."""
    if isinstance(node, dict):
        own = {node["path" if node["_target_"] in LOOK_UPS else "_target_"]} if "_target_" in node else set()
        return own.union(*map(named, node.values()))
    if isinstance(node, list):
        own = {item.partition("_target_=")[2] for item in node if isinstance(item, str) and "_target_=" in item}
        return own.union(*map(named, node))
    return set()


def test_a_recipe_may_have_what_the_configuration_calls():
    names = set().union(*(named(yaml.safe_load(file.read_text())) for file in CONFIGS.rglob("*.yaml")))
    assert len(names) > 80
    for name in sorted(names):
        check_targets({"_target_": name}, "last.ckpt", folders=RUN_FOLDERS if name.startswith(OF_RUNS) else FOLDERS)


REFUSED = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "json",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.LightningDataModule",
    "lightning.Trainer.save_checkpoint",
    "components.networks.ema.torch.load",
    "components.networks.ema.torch.hub.load",
    "components.networks.ema.polyak_update",
    "components.coding.exemplars.ExemplarMemory",
    "components.coding.exemplars.ExemplarMemory.save",
    "components.coding.image_codec.ImageCodec.save",
    "components.language.experts.Expert",
    "components.language.experts.Expert.save",
    "components.language.models._convert",
    "components.language.singular_values.decompose",
    "components.files.replacing",
    "components.buildable.buildable",
    "components.control.critics",
    "components.critics.Critics",  # where it was before
    "callbacks.run_log.RunLog",
    "callbacks.run_log.RunLog.log_metrics",
    "datamodules.online.OnlineDataModule.finish",
    "datamodules.online._Behaviour",
    "datamodules.replay.ReplayBuffer",
    "datamodules.replay.delete_replay_files",
    "datamodules.stored.transitions.write_dataset",
    "datamodules.stored.transitions.TransitionDataset.save",
    "datamodules.stored.collect.collect_dataset",
    "datamodules.stored.collect.shutil.rmtree",
    "datamodules.pixels.workers.WorkerGroup",
    "launch.files.write_text",
    "launch.wandb_logger.wandb_logger",
    "lightning_modules.base.LearningMethod.minimise",
    "torch.optim.Optimizer.load_state_dict",
    "torch.optim.lr_scheduler.LambdaLR",
]


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_else_is_called(name):
    for node in (
        {"_target_": name},
        {"_target_": "hydra.utils.get_method", "path": name},
        {"_target_": "components.networks.encoders.FlatObservations", "inner": [{"_target_": name}]},
    ):
        with pytest.raises(ValueError, match=r"^last.ckpt: [\w.\[\]]*: expected [^\n]*, found " + name) as refused:
            check_targets(node, "last.ckpt", key="module")
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "node",
    [
        "${oc.create:{_target_: os.system}}",  # as Hydra would resolve it
        {"_target_": "components.networks.encoders.${x}"},
        {"_target_": ["os.system"]},
        {"_target_": None},
        {"_target_": "components.networks.encoders.FlatObservations", "_partial_": None},
        {"_target_": "components.networks.encoders.FlatObservations", "_partial_": 5},
        {"_target_": "gymnasium.wrappers.RecordVideo", "video_folder": "x"},
        {"_target_": "hydra.utils.get_method", "path": "components.control.weighting.sqrt_scaled", "_args_": []},
        {"_target_": "hydra.utils.get_object", "path": "os.system"},
    ],
)
def test_ways_around_names_are_refused(node):
    with pytest.raises(ValueError, match=r"^last.ckpt: module"):
        check_targets({"x": node}, "last.ckpt", key="module")


def checkpoint(folder: Path, **recipe: object) -> Path:
    whole = {"experiment": "x", "study": str(folder), "spec": {}, "module": {}, "datamodule": {}, **recipe}
    counters = {
        "class": "x",
        "updates": 0,
        "env_steps": 0,
        "seconds": 0.0,
        "processes": [{"random": {}, "tallies": []}],
    }
    parts = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "pytorch-lightning_version": "2"}
    path = folder / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({**parts, "learning_method": {**counters, "recipe": whole}}, path)
    return path


def test_nothing_is_called_before_all_is_checked(tmp_path, monkeypatch):
    """The datamodule's harmful part stands behind a module that could be built."""
    called = []
    monkeypatch.setattr("components.networks.encoders.FlatObservations.__init__", lambda *_, **__: called.append(1))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    memory = {"_target_": "components.coding.exemplars.ExemplarMemory", "store": None, "bytes_per_class": 0}
    path = checkpoint(
        tmp_path,
        module={"_target_": "components.networks.encoders.FlatObservations"},
        datamodule={
            "_target_": "components.coding.exemplars.ExemplarMemory.save",
            "self": memory,
            "path": str(victim),
        },
    )
    with pytest.raises(ValueError, match=rf"^ckpt_path={path}: datamodule: expected .*found components.coding.exempl"):
        rebuild(path)
    assert victim.read_text() == "mine"
    assert not called


def test_what_can_not_be_built_is_one_sentence(tmp_path):
    module = {"_target_": "components.networks.encoders.FlatObservations", "unknown": 1}
    path = checkpoint(tmp_path, module=module)
    with pytest.raises(ValueError, match=rf"^ckpt_path={path}: module.unknown: expected what FlatObs"):
        rebuild(path)
    module = {"_target_": "components.networks.encoders.FlatObservations", "observation_shape": [3]}
    path = checkpoint(tmp_path, module=module, datamodule=module)
    with pytest.raises(ValueError, match=r"expected a LightningModule, found FlatObservations\.$"):
        rebuild(path)


@pytest.mark.parametrize(
    "spec",
    [
        {"_target_": "os.system"},
        {"encoder": {"path": "os.system"}},
        {"x": [{"_target_": "os.system"}]},
        {"x": [[{"_target_": "os.system"}]]},
    ],
)
def test_sizes_are_only_sizes(tmp_path, spec):
    with pytest.raises(ValueError, match=r"^ckpt_path=last.ckpt: expected sizes in its spec, found"):
        check_recipe({"spec": spec, "module": {}, "datamodule": {}}, Path("last.ckpt"), (), (tmp_path,))


@pytest.mark.parametrize(
    ("target", "argument"),
    [
        ("datamodules.stored.humanoid.humanoid_dataset", "root"),
        ("datamodules.stored.published.exorl_dataset", "root"),
        ("components.language.models.smollm2", "path"),
        ("components.language.adapters.SingularValueAdapter", "cache"),
    ],
)
def test_only_folders_of_the_evaluation_are_written_to(tmp_path, target, argument):
    def check(**arguments: object) -> None:
        recipe = {"spec": {}, "module": {"part": {"_target_": target, **arguments}}, "datamodule": {}}
        check_recipe(recipe, Path("last.ckpt"), (), (tmp_path / "data", tmp_path / "study"))

    check(**{argument: str(tmp_path / "data" / "inside")})
    check(**{argument: str(tmp_path / "study")})
    check(**{argument: None})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "data" / ".." / "other", tmp_path / "data" / "link", "/"):
        with pytest.raises(
            ValueError, match=rf"module.part.{argument}=.* may be written to: expected a folder in data"
        ):
            check(**{argument: str(folder)})
    with pytest.raises(ValueError, match="may be written to"):
        check(_args_=["/"])


LATER = {"_target_": "datamodules.stored.exploration.exploration_dataset", "_partial_": True}
GYM = "datamodules.environments.gymnasium.GymnasiumEnv"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"datamodule": {"environment": {"_target_": GYM, "id": LATER, "options": {"root": "{}"}}}}, "options.root={}"),
        ({"datamodule": {"environment": LATER, "protocols": {"x": {"root": "{}"}}}}, "protocols.x.root={}"),
        ({"module": {"part": LATER, "parts": [{"given": {"root": "{}"}}]}}, "module.parts.given.root={}"),
        ({"module": LATER, "spec": {"root": "{}"}}, "spec.root={}"),
        (
            {"module": {"part": {"_target_": "hydra.utils.get_method", "path": LATER["_target_"]}}},
            "module.part may be written to: expected arguments by their names",
        ),
    ],
)
def test_what_is_given_later_is_no_way_around(tmp_path, recipe, message):
    elsewhere = str(tmp_path / "elsewhere")
    recipe = {"spec": {}, "module": {}, "datamodule": {}, **json.loads(json.dumps(recipe).replace("{}", elsewhere))}
    with pytest.raises(ValueError, match=re.escape(message.replace("{}", elsewhere))):
        check_recipe(recipe, Path("last.ckpt"), (), (tmp_path / "data",))
    if "{}" in message:
        recipe = json.loads(json.dumps(recipe).replace(elsewhere, str(tmp_path / "data")))
        check_recipe(recipe, Path("last.ckpt"), (), (tmp_path / "data",))


@pytest.mark.parametrize(
    "part",
    [
        {"_target_": "callbacks.results.Results", "_partial_": True},
        {"_target_": "hydra.utils.get_class", "path": "callbacks.results.Results"},
    ],
)
def test_callbacks_of_a_run_that_is_gone_on_with_are_built_where_they_stand(tmp_path, part):
    called = check_targets({"x": part}, "run.yaml", ("lightning",), RUN_FOLDERS, key="part")
    with pytest.raises(ValueError, match=r"^run.yaml: part.x: expected a Results that is built where it stands"):
        check_writes(called, "run.yaml", tmp_path, ())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+callbacks.x._target_=shutil.rmtree", "+callbacks.x.path={}"], "callbacks.x: expected a class of this proj"),
        (
            ["+module.x={{_target_: components.coding.exemplars.ExemplarMemory.save, path: '{}'}}"],
            "module.x: expected n",
        ),
        (
            ["hydra.callbacks.x={{_target_: shutil.rmtree, path: '{}'}}"],
            "found hydra.callbacks.x, which only a person may",
        ),
        (["trust=shutil", "+callbacks.x._target_=shutil.rmtree", "+callbacks.x.path={}"], "found trust, which only"),
        (["--experimental-rerun={}"], "found '--experimental-rerun="),  # of a pickle
        (["-m"], "found '-m'"),
        (["summary='${{run_folder:{},x,null}}'"], "expected values and references, found summary='${run_folder:"),
        (["summary=${{oc.env:HOME}}"], "expected values and references, found summary=${oc.env:HOME}, which calls"),
        (["experiment=../../experiment/fb_overdrive"], "expected the name of an option of experiment"),
        (["experiment={}/x"], "expected the name of an option of experiment"),
        (["-cp={}"], "found '-cp="),
        (["--config-dir", "{}"], "found '--config-dir'"),
        (
            ["+arms.x=['hydra.searchpath=[pkg://other]']"],
            "arms.x: expected overrides of this experiment, found hydra.s",
        ),
    ],
)
def test_a_run_that_is_gone_on_with_calls_nothing_foreign(program, tmp_path, overrides, message):
    """Also a run's folder may come from anybody."""
    victim = tmp_path / "victim"
    victim.mkdir()
    run = tmp_path / "run"
    overrides = ["experiment=fb_overdrive", *(override.format(victim) for override in overrides)]
    write_overrides(run, overrides)
    finished = program(f"ckpt_path={run}")
    assert finished.code in (1, 2)
    assert message in finished.err
    assert str(run / "run.yaml") in finished.err or "arms.x" in message
    assert finished.err.count("\n") == 1
    assert victim.exists()


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("callbacks.results.Results", "folder={}"),
        ("callbacks.codec.CodecExport", "path={}/codec.safetensors"),
        ("callbacks.run_log.RunLog", "folder=tests"),  # of where the program is started
        ("datamodules.online.OnlineDataModule", "replay_folder={}"),
        ("datamodules.images.class_incremental.ClassIncrementalDataModule", "memory_folder={}"),
        ("lightning.pytorch.callbacks.ModelCheckpoint", "dirpath={}"),
        ("lightning.pytorch.callbacks.ModelCheckpoint", "filename=../other"),
        ("lightning.pytorch.loggers.CSVLogger", "name={}"),
    ],
)
def test_a_run_that_is_gone_on_with_writes_to_its_own_folder(tmp_path, target, arguments):
    run = tmp_path / "run"

    def check(text: str, typed: tuple[str, ...] = ()) -> None:
        name, _, value = text.partition("=")
        part = {
            "_target_": target,
            name: value,
            "nested": {"_target_": "components.networks.encoders.FlatObservations"},
        }
        called = check_targets({"x": part}, "run.yaml", ("lightning",), RUN_FOLDERS, key="part")
        check_writes(called, "run.yaml", run, typed)

    check(arguments.format(run / "arm" / "seed_0").replace("tests", str(run)).replace("../", ""))
    name, _, value = arguments.format(tmp_path / "other").partition("=")
    with pytest.raises(ValueError, match=rf"^run.yaml: part.x.{name}={value} may be written to: expected a folder in"):
        check(f"{name}={value}", ("part.x.nam", "part.y"))
    for typed in (f"part.x.{name}", "part.x"):
        check(f"{name}={value}", (typed,))
    with pytest.raises(ValueError, match="may be written to"):  # from which folder it leads is not known
        check(f"{name}={run}/arm/../seed_0")


def test_what_is_typed_again_may_be_written_anywhere(program, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.study.build", stop)
    run, other = tmp_path / "run", f"callbacks.results.folder={tmp_path / 'other'}"
    write_overrides(run, ["experiment=fb_overdrive", other])
    refused = program(f"ckpt_path={run}")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert refused.err.startswith(
        f"{run / 'run.yaml'}: {other} may be written to: expected a folder in {run}; if it is"
    )
    assert program(f"ckpt_path={run}", other).err.startswith("Stopped.")
    assert program("experiment=fb_overdrive", other, f"hydra.run.dir={run}").err.startswith("Stopped.")


def test_a_run_brings_no_settings_of_hydra_in_a_file(program, tmp_path):
    """Which Hydra would call before anything is checked."""
    called = tmp_path / "called"
    (tmp_path / "experiment").mkdir()
    callback = f"{{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: ['{called}']}}}}"
    text = "# @package _global_\ndefaults: [fb_overdrive]\nmodule: {updates: 7}\nhydra: {callbacks: {x: "
    (tmp_path / "experiment" / "mine.yaml").write_text(f"{text}{callback}}}}}\n")
    text = f"# @package _global_\ndefaults: [fb_overdrive]\ntrust: pathlib\ncallbacks: {{x: {callback}}}\n"
    (tmp_path / "experiment" / "trusting.yaml").write_text(text)
    text = text.replace("trust: pathlib", "hydra: {overrides: {task: ['trust=pathlib']}}")
    (tmp_path / "experiment" / "telling.yaml").write_text(text)
    where = f"hydra.searchpath=[file://{tmp_path}]"
    run = tmp_path / "run"
    outside = f"experiment={'../' * 20}{tmp_path}/experiment/mine".replace("//", "/")
    for overrides, message in (
        (["experiment=mine", where], "found an experiment that sets hydra.callbacks, which only a person may"),
        (["experiment=trusting", where], "callbacks.x: expected a class of this project, found pathlib.Path.touch"),
        (["experiment=telling", where], "found an experiment that sets hydra.overrides, which only a person may"),
        ([outside], "expected the name of an option of experiment"),
        (["experiment=mine", "hydra.searchpath=[pkg://own]", where], "expected folders, found hydra.searchpath=[pkg:"),
    ):
        write_overrides(run, overrides)
        finished = program(f"ckpt_path={run}")
        assert finished.code in (1, 2)
        assert f"{run / 'run.yaml'}: " in finished.err
        assert message in finished.err
        assert finished.err.count("\n") == 1
        assert not called.exists()
    calling = "# @package _global_\ndefaults: [fb_overdrive]\nsummary: ${oc.env:HOME}\nmodule: {updates: 7}\n"
    (tmp_path / "experiment" / "calling.yaml").write_text(calling)
    write_overrides(run, ["experiment=calling", where])
    message = f"{run / 'run.yaml'}: expected values and references, found ${{oc.env:HOME}}, which calls something"
    assert program(f"ckpt_path={run}").err.startswith(message)
    assert program(f"ckpt_path={run}", "--config-dir", str(tmp_path)).err.startswith("module.updates=7 is no multiple")
    write_overrides(run, ["experiment=mine", where])
    finished = program(f"ckpt_path={run}", "experiment=mine", "--config-dir", str(tmp_path))
    assert called.exists()  # what a person types is theirs
    assert finished.err.startswith("module.updates=7 is no multiple")


def test_a_package_of_ones_own_is_trusted_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "import os\nfrom components.buildable import buildable\nfrom components.control.pessimism import Pessimism\n"
        "class Rule(Pessimism):\n    def tell(self): ...\n"
        "class Writer:\n    def __init__(self, path): open(path, 'w').close()\n"
        "def function(): ...\n"
        "def _private(): ...\n"
        "@buildable()\ndef factory(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"found own_rules.Rule; if it is yours, add trust=own_rules\."):
        check_targets({"_target_": "own_rules.Rule"}, "last.ckpt", ("own_rule",))
    assert "own_rules" not in sys.modules  # importing it may be harm enough
    for name in ("Rule", "factory"):
        check_targets({"_target_": f"own_rules.{name}"}, "last.ckpt", ("own_rules",))
    for name in ("Rule.tell", "Writer", "function", "os.system", "buildable", "Missing"):
        with pytest.raises(ValueError, match=f"expected .*, found own_rules.{name}"):
            check_targets({"_target_": f"own_rules.{name}"}, "last.ckpt", ("own_rules",))
    # For a run of one's own, what is trusted may be anything that the package itself has.
    for name in ("Rule", "Writer", "function", "factory"):
        ((_, called, _),) = check_targets({"_target_": f"own_rules.{name}"}, "run.yaml", ("own_rules",), unmarked=True)
        assert called is getattr(sys.modules["own_rules"], name)
    for name in ("os.system", "buildable", "_private", "Missing"):
        with pytest.raises(ValueError, match=f"^run.yaml: .*expected .*, found own_rules.{name}"):
            check_targets({"_target_": f"own_rules.{name}"}, "run.yaml", ("own_rules",), unmarked=True)
    with pytest.raises(ValueError, match=r"found components\.files\.replacing\.$"):
        check_targets({"_target_": "components.files.replacing"}, "run.yaml", ("own_rules",), unmarked=True)
    sys.modules.pop("own_rules")
    assert foreign_packages({"x": [{"_target_": "own_rules.Rule"}], "_target_": "callbacks.x.Y"}) == {"own_rules"}
