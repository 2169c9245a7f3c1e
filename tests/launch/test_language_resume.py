"""Experts of a language model: stop at any update, and go on exactly; two processes, and other programs."""

import json
from pathlib import Path

import pytest
import torch

from callbacks.run_log import read_rows
from launch.checkpoints import load_checkpoint
from launch.recipes import rebuild

DDP = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
SEARCH = 'arms.cem=["module.strategy=search", "module.updates={}", "module.search.population=10"]'


@pytest.fixture(scope="module")
def small(language_folder, tmp_path_factory) -> tuple[str, ...]:
    """A study of the tiny model, whose answers are sampled."""
    return (
        "experiment=svf_larger",
        *(f"~arms.{arm}" for arm in ("untrained", "svf_next_token", "lora", "lora_next_token")),
        "language_model=folder",
        f"language_model.path={language_folder}",
        f"data_root={tmp_path_factory.mktemp('data')}",
        "module.temperature=1.0",
        "module.baseline=leave_one_out",
        "module.kl_coefficient=0.1",
        "module.micro_batch=4",
        "updates=40",
        "checkpoint_every=5",
        "protocol.batch_size=8",
        "protocol.evaluate_every=20",
        "protocol.validation_questions=8",
        "protocol.test_questions=8",
        "datamodule.other_questions=4",
    )


@pytest.fixture(scope="module")
def uninterrupted(program, small, tmp_path_factory):
    finished = program(*small, f"output_root={tmp_path_factory.mktemp('whole')}")
    assert finished.code == 0, finished.err
    return finished.folder


def test_killed_runs_go_on_bit_for_bit(assert_same_runs, program, small, run_and_kill, uninterrupted, tmp_path):
    for attempt, updates in enumerate((7, 23)):
        more = ("ckpt_path=last",) if attempt else ()
        folder = run_and_kill(*small, *more, root=tmp_path, arm="svf", updates=updates, seconds=0.02)
    saved = load_checkpoint(folder / "svf" / "seed_0" / "checkpoints" / "last.ckpt")
    assert 20 <= saved["learning_method"]["updates"] < 40
    finished = program("experiment=svf_larger", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    experts = [(path / "svf/seed_0/expert.safetensors").read_bytes() for path in (folder, uninterrupted)]
    assert experts[0] == experts[1]
    assert_same_runs(folder, uninterrupted, ["svf"], holds=("exp_avg_sq", "best_0", "original0"))


def test_a_report_of_all_arms(uninterrupted):
    report = (uninterrupted / "report.md").read_text()
    assert "| | base | svf | shuffled |" in report
    for metric in ("larger/accuracy", "addm/accuracy", "lastword/accuracy", "parameters"):
        assert f"| {metric} |" in report
    assert "| larger | answer | base | svf | shuffled |" in report
    assert (uninterrupted / "learning_curves.png").exists()
    rows = read_rows(uninterrupted / "svf" / "seed_0" / "train.csv")[1]
    assert [int(row["updates"]) for row in rows] == list(range(1, 41))
    assert {"accuracy", "kl", "gradient_norm"} <= rows[0].keys()


def test_checkpoints_hold_what_is_trained_alone(uninterrupted):
    saved = load_checkpoint(uninterrupted / "svf" / "seed_0" / "checkpoints" / "last.ckpt")
    assert not [name for name in saved["state_dict"] if "embed_tokens" in name]


def test_two_processes_learn_and_resume(spawn, small, wait_for_updates, tmp_path):
    arguments = (*small, *DDP, "updates=20", f"output_root={tmp_path}")
    first = spawn(*arguments)
    wait_for_updates(first, tmp_path, "svf", 12)
    first.kill()
    first.wait()
    second = spawn(*arguments, "ckpt_path=last")
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert "resuming after" in out
    (folder,) = (tmp_path / "svf_larger").iterdir()
    rows = read_rows(folder / "svf" / "seed_0" / "train.csv")[1]
    assert [int(row["updates"]) for row in rows] == list(range(1, 21))
    assert "| | base | svf | shuffled |" in (folder / "report.md").read_text()


def test_two_processes_share_the_models_weights(spawn, small, tmp_path):
    sharded = ("trainer=fsdp", *DDP[1:], "adapter.factorised=true", "~arms.shuffled", "updates=20")
    process = spawn(*small, *sharded, f"output_root={tmp_path / 'one'}")
    refused = spawn(*small, *sharded, "adapter.factorised=false", f"output_root={tmp_path / 'other'}")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = Path(out.strip().splitlines()[-1])
    rows = read_rows(folder / "svf" / "seed_0" / "train.csv")[1]
    assert [int(row["updates"]) for row in rows] == list(range(1, 21))
    assert (folder / "svf" / "seed_0" / "expert.safetensors").exists()
    out, err = refused.communicate(timeout=200)
    assert refused.returncode == 1
    assert "adapter.factorised=false: expected true where weights are split over processes" in err


def test_a_checkpoint_of_another_model_is_refused(program, small, uninterrupted, tmp_path, language_folder):
    import shutil

    other = tmp_path / "model"
    shutil.copytree(language_folder, other)
    weights = other / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    folder = tmp_path / "study"
    shutil.copytree(uninterrupted, folder)
    (folder / "svf" / "seed_0" / "results.json").unlink()
    finished = program("experiment=svf_larger", f"ckpt_path={folder}", f"language_model.path={other}")
    assert finished.code == 1
    assert "is finished: expected" in finished.err
    for arm in ("base", "shuffled"):
        (folder / arm / "seed_0" / "results.json").unlink()
        shutil.rmtree(folder / arm)
    finished = program("experiment=svf_larger", f"ckpt_path={folder}", f"language_model.path={other}")
    assert finished.code == 1
    assert "The checkpoint adapts the model" in finished.err


@pytest.fixture(scope="module")
def adaptation(language_folder, tmp_path_factory) -> tuple[str, ...]:
    """Two experts of few updates, and a search for their mixtures."""
    return (
        "experiment=transformer_squared",
        *(f"~arms.{arm}" for arm in ("expert_addm", "classifier_expert", "base", "in_context", "uniform")),
        *(f"~arms.{arm}" for arm in ("classifier", "shuffled", "cem_per_matrix", "random_shooting")),
        "~experts.arithmetic",
        "language_model=folder",
        f"language_model.path={language_folder}",
        f"data_root={tmp_path_factory.mktemp('data')}",
        "updates=5",
        SEARCH.format(30),
        "checkpoint_every=5",
        "protocol.batch_size=4",
        "protocol.validation_questions=4",
        "protocol.test_questions=4",
        "protocol.shots=4",
        "datamodule.generation_batch=3",
    )


@pytest.fixture(scope="module")
def searched(program, adaptation, tmp_path_factory) -> Path:
    whole = program(*adaptation, f"output_root={tmp_path_factory.mktemp('searched')}")
    assert whole.code == 0, whole.err
    return whole.folder


def test_a_killed_search_goes_on_bit_for_bit(assert_same_runs, program, adaptation, searched, run_and_kill, tmp_path):
    assert (searched / "prompt" / "seed_0" / "confusion.png").exists()
    assert not (searched / "cem" / "seed_0" / "confusion.png").exists()
    report = (searched / "report.md").read_text()
    assert "| | expert_larger | expert_lastword | prompt | best_expert | cem |" in report
    assert "| largest3/accuracy |" in report
    folder = run_and_kill(*adaptation, root=tmp_path / "killed", arm="cem", updates=13)
    saved = load_checkpoint(folder / "cem" / "seed_0" / "checkpoints" / "last.ckpt")
    assert 10 <= saved["learning_method"]["updates"] < 30
    finished = program("experiment=transformer_squared", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    assert_same_runs(folder, searched, ["cem", "best_expert"], holds=("chosen",))
    elsewhere = folder.rename(tmp_path / "elsewhere")
    checkpoint = elsewhere / "cem" / "seed_0" / "checkpoints" / "last.ckpt"
    data_root = next(each.removeprefix("data_root=") for each in adaptation if each.startswith("data_root="))
    module, _, _ = rebuild(checkpoint, data_root=data_root)  # its experts have moved with it
    assert torch.equal(module.chosen, load_checkpoint(checkpoint)["state_dict"]["chosen"])


def test_two_processes_share_a_population(program, spawn, adaptation, searched, tmp_path):
    """They try half of the candidates each, with all of the model's weights or half of them, as one process does."""
    kept = [each for each in adaptation if each not in ("~arms.expert_addm", "~arms.classifier_expert")]
    given = ("experts=given", f"experts_folder={searched}", *kept, "~arms.best_expert", SEARCH.format(6))
    given = (*given, "adapter.factorised=true", f"output_root={tmp_path}")
    started = [spawn(*given, *trainer, *DDP[1:]) for trainer in (("trainer=ddp",), ("trainer=fsdp",))]
    alone = program(*given)
    assert alone.code == 0, alone.err
    folders = [alone.folder]
    for process in started:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        folders.append(Path(out.strip().splitlines()[-1]))
    found = []
    for folder in folders:
        assert list(json.loads((folder / "results.json").read_text())["arms"]) == ["prompt", "cem"]
        rows = read_rows(folder / "cem" / "seed_0" / "train.csv")[1]
        assert [int(row["updates"]) for row in rows] == list(range(1, 7))
        found.append([(row["population_accuracy"], row["best_accuracy"]) for row in rows])
    assert found[1:] == found[:1] * 2
