"""Critics of stored pictures, then an actor against them: one run from the command line, through its switch."""

from callbacks.run_log import read_rows
from tests.launch.test_evaluate import call

OFFLINE = (
    "experiment=paper/alix_offline_cheetah",
    "arms.shift=null",
    "arms.none=null",
    "num_seeds=1",
    "trainer=cpu",
    "module.compile=null",
    "module.critic.hidden_dim=8",
    "module.actor.network.hidden_dim=8",
    "module.encoder.channels=4",
    "module.policy_evaluation_updates=20",
    "module.log_every=5",
    "datamodule.environment.size=24",
    "datamodule.environment.episode_length=60",
    "datamodule.training_episodes=2",
    "datamodule.batch_size=8",
    "datamodule.scored=20",
    "datamodule.evaluate_every=10",
    "datamodule.episodes=2",
    "datamodule.curve_episodes=1",
    "callbacks.films=null",
    "callbacks.reward_curves=null",
    "checkpoint_every=5",
)


def test_a_run_goes_on_before_and_after_the_critics_are_frozen(assert_same_runs, program, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = program(*OFFLINE, f"output_root={tmp_path / 'whole'}", "module.updates=40")
    assert (whole.code, whole.err) == (0, "")
    parts = [program(*OFFLINE, f"output_root={tmp_path}", "module.updates=10")]
    for updates in (30, 40):
        parts.append(program(*OFFLINE, f"output_root={tmp_path}", f"module.updates={updates}", "ckpt_path=last"))
        assert "resuming after" in parts[-1].out
    assert_same_runs(parts[-1].folder, whole.folder, ["alix"])

    _, rows = read_rows(whole.folder / "alix" / "seed_0" / "train.csv")
    learned = {int(row["updates"]): (bool(row["critic_loss"]), bool(row["actor_loss"])) for row in rows}
    assert learned == {update: (update <= 20, update > 20) for update in range(5, 41, 5)}
    report = (whole.folder / "report.md").read_text()
    assert "| default_reset/reward |" in report
    assert "random policy" in report

    code, out, _ = call(f"ckpt_path={whole.folder}", "reward=2 * reward", "episodes=2", "seconds=0.1")
    assert code == 0
    assert "default_reset/reward/return" in out
    assert "td_loss" not in out
