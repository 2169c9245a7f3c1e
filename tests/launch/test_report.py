"""The report over the runs of an experiment, and over one evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.arms import Run
from launch.files import write_json
from launch.overrides import NEUTRAL, departures
from launch.report import HOW_LONG, write_evaluation, write_report
from launch.statistics import bootstrap_interval
from launch.study import _nowhere

MADE = {
    "code": "abc+",
    "versions": {"python": "3.11", "torch": "2.15"},
    "hardware": {"cpu": "Chip", "cores": 2, "threads": 1, "memory_gb": 8.0, "gpus": ["Card"]},
}
CONFIG = {
    "name": "name",
    "summary": "A summary.",
    "notes": [],
    "curves_against": None,
    "training_curves": [],
    "aggregate": "*/return",
    "contrasts": {},
}


@pytest.fixture
def study(tmp_path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Writes the report over runs with the given metrics, by arm and for each seed; gives results.json and report."""

    def write(
        arms: dict[str, list[dict[str, list[float]]]],
        overrides: tuple[str, ...] = ("experiment=name",),
        references: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], str]:
        runs = []
        for seed in range(max(map(len, arms.values()))):
            for arm, seeds in arms.items():
                runs.append(Run(arm, seed, tmp_path / arm / f"seed_{seed}"))
                result = {"updates": 1000, "seconds": 10.0 + seed, "metrics": seeds[seed], "provenance": MADE}
                write_json(runs[-1].results, result)
        if references:
            write_json(tmp_path / "references.json", references)
        write_report(OmegaConf.create({**CONFIG, **settings}), overrides, runs, tmp_path, ["A remark."])
        return json.loads((tmp_path / "results.json").read_text()), (tmp_path / "report.md").read_text()

    return write


def test_spread_is_over_seeds_and_a_seed_is_the_mean_of_its_episodes(study):
    values = [[1.0, 3.0], [4.0, 6.0], [0.0, 8.0], [9.0, 11.0], [100.0, 100.0]]
    results, report = study({"arm": [{"task/return": each} for each in values]})
    found = results["arms"]["arm"]["task/return"]
    means = [2.0, 5.0, 4.0, 10.0, 100.0]
    assert found["by_seed"] == {str(seed): mean for seed, mean in enumerate(means)}
    assert (found["n"], found["over"]) == (5, "seeds")
    assert found["mean"] == pytest.approx(24.2)
    assert found["stderr"] == pytest.approx((7216.8 / 4 / 5) ** 0.5)  # squares of -22.2, -19.2, -20.2, -14.2, 75.8
    assert found["iqm"] == pytest.approx((4 + 5 + 10) / 3)
    assert found["interval"] == list(bootstrap_interval([[mean] for mean in means]))
    assert "mean ± standard error over seeds, each being the mean of its episodes." in report
    assert "| task | 24.2 ± 19.0 |" in report
    low, high = found["interval"]
    assert f"| task | 6.33 [{low:.2f}, {high:.2f}] |" in report
    assert "Each seed, 0 / 1 / 2 / 3 / 4:\n\n| | arm |\n|---|---:|\n| task | 2.0 / 5.0 / 4.0 / 10.0 / 100.0 |" in report
    assert "arm 10, 11, 12, 13, 14 s (1,000 updates)" in report


def test_one_seed_tells_of_its_episodes_alone(study):
    results, report = study({"arm": [{"task/return": [1.0, 3.0], "loss": [5.0]}]})
    arm = results["arms"]["arm"]
    assert arm["task/return"] == {"mean": 2.0, "stderr": 1.0, "n": 2, "over": "episodes", "by_seed": {"0": 2.0}}
    assert arm["loss"]["stderr"] is None
    assert "mean ± standard error over episodes." in report
    assert "| task | 2.00 ± 1.00 |" in report
    assert "| loss | 5.00 |" in report
    assert "Interquartile" not in report
    assert "Each seed" not in report


def test_tasks_are_taken_together_where_all_seeds_have_them(study):
    seeds = [{"a/return": [float(s)], "b/return": [10.0 * s], "c/score": [1.0]} for s in range(3)]
    results, report = study({"arm": seeds, "part": [*seeds[:2], {"a/return": [0.0]}]})
    together = results["aggregate"]["arm"]
    assert (together["tasks"], together["n"]) == (["a/return", "b/return"], 3)
    assert together["iqm"] == pytest.approx((0 + 1 + 2 + 10) / 4)
    assert together["interval"] == list(bootstrap_interval([[0, 0], [1, 10], [2, 20]]))
    assert results["aggregate"]["part"]["n"] == 2
    assert "| 2 tasks together | 3.25 [" in report
    results, report = study({"arm": seeds[1:2]})
    assert results["aggregate"]["arm"]["interval"] is None
    assert "Interquartile mean over tasks:\n\n| | arm |\n|---|---:|\n| 2 tasks together | 5.50 |\n\n" in report
    assert study({"arm": seeds}, aggregate=None)[0]["aggregate"] == {}


def test_arms_are_compared_seed_by_seed(study):
    """Whatever all arms have in common with a seed drops out."""
    common = [0.0, 100.0, 300.0]
    arms = {
        arm: [{"task/return": [value + gain * (seed + 1)]} for seed, value in enumerate(common)]
        for arm, gain in (("a", 3.0), ("b", 1.0), ("c", 0.5))
    }
    contrasts = {"gain": {"a": 1, "b": -1}, "more": {"a": 1, "b": -1.5, "c": 0.5}, "gone": {"a": 1, "d": -1}}
    results, report = study(arms, contrasts=contrasts)
    assert list(results["contrasts"]) == ["gain", "more"]
    found = results["contrasts"]["gain"]["task/return"]
    assert found["by_seed"] == pytest.approx({"0": 2.0, "1": 4.0, "2": 6.0})
    assert (found["mean"], found["n"], found["stderr"]) == (pytest.approx(4.0), 3, pytest.approx(2 / 3**0.5))
    low, high = found["interval"]
    assert [low, high] == list(bootstrap_interval([[2.0], [4.0], [6.0]]))
    assert "gain is +a -b; more is +a -1.5 b +0.5 c." in report
    assert f"| | gain | more |\n|---|---:|---:|\n| task | 4.00 ± 1.15, 4.00 [{low:.2f}, {high:.2f}] |" in report
    results, report = study({arm: seeds[:1] for arm, seeds in arms.items()}, contrasts={"gain": {"a": 1, "b": -1}})
    assert results["contrasts"]["gain"]["task/return"]["mean"] == pytest.approx(2.0)
    assert "Arms against each other, every seed with itself: gain is +a -b." in report
    assert "| task | 2.00 |" in report
    assert "Arms against" not in study(arms)[1]


def test_a_reference_says_that_its_spread_is_over_episodes(study):
    arms = {"arm": [{"task/return": [1.0, 2.0]}, {"task/return": [3.0, 4.0]}]}
    references = {"random policy": {"task/return": [1.0, 3.0]}, "best episode": {"task/return": [9.0]}}
    results, report = study(arms, references=references)
    random = results["arms"]["random policy"]["task/return"]
    assert random == {"mean": 2.0, "stderr": 1.0, "n": 2, "over": "episodes"}
    assert "| task | 2.50 ± 1.00 | 2.00 ± 1.00 (episodes) | 9.00 |" in report
    assert "(episodes): over those, for want of seeds" in report
    assert "| task | 1.50 / 3.50 |\n" in report  # no reference among those with seeds
    _, report = study({"arm": arms["arm"][:1]}, references=references)
    assert "| task | 1.50 ± 0.50 | 2.00 ± 1.00 | 9.00 |" in report


def test_seeds_may_differ_in_what_they_measured(study):
    """A run that was begun before a score had its name, or a score that one seed alone could be given."""
    results, report = study({"arm": [{"task": [1.0, 3.0], "old": [5.0, 6.0]}, {"task": [4.0, 6.0], "new": [7.0]}]})
    arm = results["arms"]["arm"]
    assert (arm["task"]["mean"], arm["task"]["stderr"], arm["task"]["n"]) == (3.5, 1.5, 2)
    assert (arm["old"]["mean"], arm["old"]["stderr"], arm["old"]["n"], arm["old"]["over"]) == (5.5, None, 1, "seeds")
    assert "| task | 3.50 ± 1.50 |" in report
    assert "| old | 5.50 (n=1) |" in report
    assert "| old | 5.50 / - |" in report


def test_an_arm_without_scores_keeps_its_column(study):
    assert (
        "| | arm | mute |\n|---|---:|---:|\n| task | 1.00 | - |" in study({"arm": [{"task": [1.0]}], "mute": [{}]})[1]
    )


def test_notes_say_which_settings_they_were_not_written_for(study):
    arm = {"arm": [{"task": [1.0]}]}
    plain = ("experiment=name", "num_seeds=1", "threads=1", "trainer.devices=2", "output_root=x")
    _, report = study(arm, plain, notes=["A note."])
    assert "|\n\nA note.\n\nA remark.\n" in report
    assert (
        "```bash\npython train.py experiment=name num_seeds=1 threads=1 trainer.devices=2 output_root=x\n```" in report
    )
    _, report = study(arm, (*plain, "module.updates=5", "~arms.other", "module/critic=x"), notes=["A note."])
    said = "written for its own settings and not for `module.updates=5`, `~arms.other`, `module/critic=x`:"
    assert f"The experiment's notes, {said}\n\nA note.\n\nA remark.\n" in report
    told = (*plain, "objective=eval/x", "logger=wandb", "trust=mine", "aggregate=null", "trainer.devices=3")
    assert departures(told, NEUTRAL) == ["num_seeds=1", "threads=1", "trainer.devices=3"]
    assert departures(told, (*NEUTRAL, *HOW_LONG)) == []
    assert departures(("module.updates=5", "a=1", "++module.updates=6"), ()) == ["++module.updates=6", "a=1"]


def test_what_made_the_numbers_is_said_once_or_for_each_kind_of_run(study, tmp_path):
    results, report = study({"a": [{"task": [1.0]}], "b": [{"task": [1.0]}]})
    assert results["provenance"] == [{**MADE, "runs": ["a/seed_0", "b/seed_0"]}]
    assert (
        "Made by tenfold abc, with uncommitted changes; python 3.11, torch 2.15; on 2 cores of Chip, Card, "
        "8 GB of memory, 1 thread.\n" in report
    )
    run = Run("b", 0, tmp_path / "b" / "seed_0")
    other = {**MADE, "code": "def"}
    write_json(run.results, {"updates": 1, "seconds": 1.0, "metrics": {"task": [1.0]}, "provenance": other})
    runs = [Run("a", 0, tmp_path / "a" / "seed_0"), run]
    write_report(OmegaConf.create(CONFIG), ["experiment=name"], runs, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "Made (a/seed_0) by tenfold abc, with" in report
    assert "Made (b/seed_0) by tenfold def; python" in report


def test_pictures_of_runs_are_shown(study, tmp_path):
    (tmp_path / "arm" / "seed_0").mkdir(parents=True)
    (tmp_path / "arm" / "seed_0" / "rewards.png").touch()
    assert "![rewards of arm, seed 0](arm/seed_0/rewards.png)" in study({"arm": [{"task": [1.0]}]})[1]


def test_what_language_models_said_stands_beside_each_other(study, tmp_path):
    for arm in ("base", "svf"):
        for seed in range(2):
            said = {"question": "a|b?", "answer": "a", "completion": f" {arm}\n{seed}.", "right": arm == "svf"}
            write_json(tmp_path / arm / f"seed_{seed}" / "completions.json", {"sums": [said]})
    _, report = study({"base": [{"x": [1.0]}] * 2, "svf": [{"x": [1.0]}] * 2})
    assert "| sums | answer | base | svf |\n|---|---|---|---|\n| a\\|b? | a | base 0. ✗ | svf 0. ✓ |\n" in report
    assert "base 1." not in report


def test_an_evaluation_has_a_report_of_its_own(tmp_path: Path):
    result = {"updates": 5, "seconds": 1.0, "metrics": {"task/return": [1.0, 3.0], "x": [5.0]}, "provenance": MADE}
    write_json(tmp_path / "results.json", result)
    (tmp_path / "rewards.png").touch()
    rewards = {"start": {"run": "run", "reward": "height > 1"}}
    table = write_evaluation("name after 5 updates", "python evaluate.py ckpt_path=x", rewards, tmp_path)
    assert table.splitlines()[2:] == ["| task/return | 2.00 ± 1.00 | 2 |", "| x | 5.00 | 1 |"]
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# name after 5 updates\n\n```bash\npython evaluate.py ckpt_path=x\n```\n\n")
    assert "From the starts of `start`: `run`; `reward`, which is `height > 1`.\n" in report
    assert table in report
    assert "![rewards](rewards.png)" in report
    assert "Made by tenfold abc" in report
    write_json(tmp_path / "results.json", {**result, "provenance": {"code": "abc"}})
    with pytest.raises(ValueError, match=r"results.json.provenance: expected versions, found none"):
        write_evaluation("", "", {}, tmp_path)


def test_a_spread_that_nobody_knows_is_not_spoken_of(study):
    _, report = study({"arm": [{"held_out/error": [5.0]}]})
    assert "Seed 0; one value each, of which no spread is known." in report
    assert "±" not in report


def test_metrics_that_no_run_has_are_named_to_who_asked_for_them(study, tmp_path):
    study({"arm": [{"task/return": [1.0]}]})
    (tmp_path / "arm" / "seed_0" / "train.csv").write_text("updates,env_steps,seconds,critic_loss\n1,0,0.5,2\n")
    config = OmegaConf.create(
        {"training_curves": ["critic_loss", "critic_los"], "curves_against": "task/return", "aggregate": "*/scor"}
    )
    runs = [Run("arm", 0, tmp_path / "arm" / "seed_0")]
    assert sorted(_nowhere(config, {"training_curves", "aggregate", "curves_against"}, runs)) == [
        "aggregate: no run has measured */scor; expected one of task/return.",
        "training_curves: no run has measured critic_los; expected one of critic_loss.",
    ]
    assert not list(_nowhere(config, {"module.updates"}, runs))  # an experiment's own, of arms that are left out
