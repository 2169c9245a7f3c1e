"""Class-incremental runs: stop in any part of the codec's training or in the middle of a task, and go on exactly."""

import pytest

from launch.checkpoints import load_checkpoint

INFORMATION_BACK = (
    "store=bits_back",
    "datamodule.raw_per_class=1",
    "datamodule.pairs=8",
    "datamodule.selection=herding",
    "module.information_back=0.5",
)
SMALL = (
    "experiment=drr_digits",
    *(f"~arms.{arm}" for arm in ("fine_tuning", "joint", "raw_64", "fixed_64", "static_64")),
    *(f"~arms.{arm}" for arm in ("raw_128", "fixed_128", "static_128", "bits_back_128")),
    "num_seeds=1",
    "codec_updates={autoencoder: 60, code_model: 60}",
    "task_updates=[40, 20, 20, 20, 20, 20]",
    "checkpoint_every=15",
    "module.log_every=5",
    # The contrastive loss, raw exemplars and herding too.
    f"arms.bits_back_64=[{', '.join(repr(override) for override in INFORMATION_BACK)}]",
)


@pytest.fixture(scope="module")
def uninterrupted(program, tmp_path_factory):
    finished = program(*SMALL, f"output_root={tmp_path_factory.mktemp('whole')}")
    assert finished.code == 0, finished.err
    return finished.folder


def test_killed_runs_go_on_bit_for_bit(assert_same_runs, program, run_and_kill, uninterrupted, tmp_path):
    for arm, updates in (("codec", 30), ("codec", 80), ("bits_back_64", 75)):
        more = ("ckpt_path=last",) if any(tmp_path.iterdir()) else ()
        folder = run_and_kill(*SMALL, *more, root=tmp_path, arm=arm, updates=updates, seconds=0.05)
    saved = load_checkpoint(folder / "bits_back_64" / "seed_0" / "checkpoints" / "last.ckpt")
    assert 60 <= saved["learning_method"]["updates"] < 140
    assert saved["ClassIncrementalDataModule"]["finished"] >= 2
    finished = program("experiment=drr_digits", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    codecs = [(path / "codec/seed_0/codec.safetensors").read_bytes() for path in (folder, uninterrupted)]
    assert codecs[0] == codecs[1]
    assert_same_runs(folder, uninterrupted, ["codec", "bits_back_64"], holds=("exp_avg_sq",))


def test_a_run_goes_on_from_the_end_of_a_task(assert_same_runs, program, run_and_kill, uninterrupted, tmp_path):
    """The rows of new classes are drawn when a task begins, which then is after a resumption."""
    folder = run_and_kill(*SMALL, "checkpoint_every=1000", root=tmp_path, arm="bits_back_64", updates=70)
    saved = load_checkpoint(folder / "bits_back_64" / "seed_0" / "checkpoints" / "last.ckpt")
    assert saved["learning_method"]["updates"] in (60, 80, 100, 120)
    finished = program("experiment=drr_digits", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    assert_same_runs(folder, uninterrupted, ["codec", "bits_back_64"], holds=("exp_avg_sq",))


def test_a_report_of_all_arms(uninterrupted):
    report = (uninterrupted / "report.md").read_text()
    assert "| | codec | bits_back_64 |" in report
    for metric in ("test/average_incremental_accuracy", "memory/bytes_with_models", "base/bits_back_net_bits"):
        assert f"| {metric} |" in report
    assert "(codec/seed_0/reconstructions.png)" in report
    assert (uninterrupted / "codec/seed_0/reconstructions.png").exists()
    assert (uninterrupted / "learning_curves.png").exists()


def test_other_settings_of_the_codec_are_named(program, uninterrupted):
    """Its weights are of another size."""
    weights = uninterrupted / "codec" / "seed_0" / "codec.safetensors"
    arguments = ("experiment=drr_digits", "arms=null", f"datamodule.store.weights={weights}")
    finished = program(*arguments, f"output_root={uninterrupted / 'other'}", "codec.autoencoder.width=16")
    assert finished.code == 1
    assert "is torch.float32 [16, 1, 4, 4], expected torch.float32 [8, 1, 4, 4]" in finished.err
    assert len(finished.err.strip().splitlines()) == 1
