"""Offline learning from chosen episodes, with a state value and priorities: stop at any update, and go on exactly."""

from launch.checkpoints import load_checkpoint

SMALL = (
    "experiment=mood_swirl",
    *(f"~arms.{arm}" for arm in ("narrow_same", "wide_same", "wide_mixed")),
    "module=iql",
    "module/objective=asac",
    "module.objective.advantage=state",
    "module/encoder=standardised",
    "num_seeds=1",
    "module.critic.hidden_dim=8",
    "module.value.network.hidden_dim=8",
    "module.actor_every=2",
    "module.evaluation_samples=[1,5]",
    "module.updates=400",
    "module.log_every=10",
    "datamodule.dataset.episodes=5",
    "datamodule.max_episodes=20",
    "datamodule.evaluate_every=100",
    "datamodule.episodes=4",
    "datamodule.curve_episodes=2",
    "checkpoint_every=10",
)


def test_killed_run_goes_on_bit_for_bit(assert_same_runs, program, run_and_kill, tmp_path):
    whole = program(*SMALL, f"output_root={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    folder = run_and_kill(*SMALL, root=tmp_path / "killed", arm="narrow_mixed", updates=120)
    saved = load_checkpoint(folder / "narrow_mixed" / "seed_0" / "checkpoints" / "last.ckpt")
    assert 100 <= saved["learning_method"]["updates"] < 400
    assert (saved["OfflineDataModule"]["priorities"]["level_0"] != 0).sum() > 300
    refused = program("experiment=mood_swirl", f"ckpt_path={folder}", "datamodule.max_episodes=21")
    assert refused.code == 1
    assert "datamodule.dataset: expected the data that the checkpoint's run was trained on" in refused.err
    finished = program("experiment=mood_swirl", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    assert_same_runs(folder, whole.folder, ["narrow_mixed"], holds=("value.network", "log_std", "encoder.scale"))
    report = (whole.folder / "report.md").read_text()
    for row in ("score", "score_of_5", "return_of_5"):
        assert f"| swirl/goal/{row} |" in report
    assert "Arms against each other" not in report  # of whom only one was run
