"""A disk that fills up stops a run with one sentence; with room again it goes on bit for bit."""

from pathlib import Path

import pytest

from launch.checkpoints import load_checkpoint

RUN = "fb_aw_narrow/seed_0"


@pytest.fixture(scope="module")
def whole(program, one_arm, tmp_path_factory):
    finished = program(*one_arm, f"output_root={tmp_path_factory.mktemp('whole')}", "module.updates=80")
    assert finished.code == 0, finished.err
    return finished.folder


def test_a_run_goes_on_after_its_disk_was_full(program, one_arm, assert_same_runs, whole, small_disk):
    checkpoint = (whole / RUN / "checkpoints" / "last.ckpt").stat().st_size
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8 * 2**20 - int(1.7 * checkpoint)))  # room for one, but not for a second beside it
    finished = program(*one_arm, f"output_root={small_disk}", "module.updates=80")
    (folder,) = (small_disk / "fb_overdrive").iterdir()
    path = folder / RUN / "checkpoints" / "last.ckpt"
    assert finished.code == 1
    assert finished.err == (
        f"{path}: expected to read or write it, found: No space left on device. (TENFOLD_TRACEBACK=1 shows where.)\n"
    )
    assert load_checkpoint(path)["learning_method"]["updates"] == 10
    assert not list(small_disk.rglob(".saving*"))
    filler.unlink()
    finished = program("experiment=fb_overdrive", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    assert "resuming after 10 updates" in finished.out
    assert_same_runs(folder, whole, ["fb_aw_narrow"])


@pytest.mark.parametrize("name", [f"{RUN}/train.csv", "learning_curves.png"])
def test_a_folder_where_a_file_belongs_is_one_sentence(program, one_arm, name, tmp_path):
    """Any other refusal of the system goes the same way."""
    (tmp_path / name / "occupied").mkdir(parents=True)
    finished = program(*one_arm, f"hydra.run.dir={tmp_path}", "module.updates=10", "datamodule.evaluate_every=5")
    assert finished.code == 1
    assert finished.err.startswith(f"{tmp_path / name}: expected ")
    assert finished.err.count("\n") == 1
    assert not list(tmp_path.rglob(".saving*"))


def test_a_folder_that_cannot_be_made_is_one_sentence(program, one_arm):
    file = Path(__file__)
    finished = program(*one_arm, f"output_root={file}")
    assert finished.code == 1
    assert finished.err.startswith(f"{file}/fb_overdrive")
    assert "expected to read or write it, found: Not a directory." in finished.err
