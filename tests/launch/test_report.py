"""The report over the runs of an experiment."""

import json

from matplotlib.axes import Axes
from omegaconf import OmegaConf

from launch.files import write_json
from launch.report import write_report
from launch.study import Run


def test_seeds_may_differ_in_what_they_measured(tmp_path):
    """A run that was begun before a score had its name, or a score that one seed alone could be given."""
    metrics = [{"task/return": [1.0, 3.0], "old": [5.0]}, {"task/return": [4.0, 6.0], "new": [7.0]}]
    runs = [Run("arm", seed, tmp_path / "arm" / f"seed_{seed}") for seed in range(2)]
    for run, found in zip(runs, metrics):
        write_json(run.results, {"updates": 10, "seconds": 1.0, "metrics": found})
    config = OmegaConf.create(
        {"name": "name", "summary": "A summary.", "notes": [], "curves_against": None, "training_curves": []}
    )
    write_report(config, ["experiment=name"], runs, tmp_path)
    arm = json.loads((tmp_path / "results.json").read_text())["arms"]["arm"]
    assert arm["task/return"] == {"mean": 3.5, "stderr": 1.5, "n": 2}
    assert (arm["old"]["mean"], arm["old"]["n"]) == (5.0, 1)
    assert (arm["new"]["mean"], arm["new"]["n"]) == (7.0, 1)
    report = (tmp_path / "report.md").read_text()
    assert "```bash\npython train.py experiment=name\n```" in report
    assert "| task | 3.50 ± 1.50 |" in report
    assert "| old | 5.00 (n=1) |" in report


def test_curves_of_many_arms_are_means_against_what_is_asked_for(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((self, a, k)) or plot(self, *a, **k))
    runs = [Run(f"arm_{arm}", seed, tmp_path / f"arm_{arm}" / f"seed_{seed}") for arm in range(8) for seed in range(2)]
    for index, run in enumerate(runs):
        write_json(run.results, {"updates": 10, "seconds": 1.0, "metrics": {"accuracy": [50.0]}})
        rows = [f"{step},0,1,{step // 5},{index + step}" for step in (5, 10)]
        (run.folder / "eval.csv").write_text("\n".join(["updates,env_steps,seconds,classes,accuracy", *rows]) + "\n")
    config = {
        "name": "name",
        "summary": "A summary.",
        "notes": [],
        "curves_against": "classes",
        "training_curves": ["loss"],
    }
    write_report(OmegaConf.create(config), ["experiment=name"], runs, tmp_path)
    assert {axis.get_title() for axis, _, _ in drawn} == {"accuracy"}
    assert drawn[0][0].get_xlabel() == "classes"
    means = {settings["label"]: arguments for _, arguments, settings in drawn if settings["label"]}
    assert len(means) == 8
    assert means["arm_3"] == ([1.0, 2.0], [6.5 + 5, 6.5 + 10])
    assert len({str(settings["color"]) for _, _, settings in drawn}) == 8
    assert (tmp_path / "learning_curves.png").exists()
    assert not (tmp_path / "learning_curves_2.png").exists()


def test_an_arm_that_has_no_curve_is_a_line_beside_those_that_have(tmp_path, monkeypatch):
    lines = {}
    monkeypatch.setattr(Axes, "axhline", lambda self, y, label, **_: lines.update({(self.get_title(), label): y}))
    runs = [Run(arm, 0, tmp_path / arm / "seed_0") for arm in ("learned", "base")]
    for run, score in zip(runs, (80.0, 50.0)):
        write_json(run.results, {"updates": 10, "seconds": 1.0, "metrics": {"accuracy": [score]}})
    (runs[0].folder / "eval.csv").write_text("updates,env_steps,seconds,accuracy\n5,0,1,60\n10,0,1,80\n")
    config = {"name": "x", "summary": "x", "notes": [], "curves_against": None, "training_curves": []}
    write_report(OmegaConf.create(config), ["experiment=name"], runs, tmp_path)
    assert list(lines.items()) == [(("", "base"), 50.0)]


def test_what_is_drawn_against_something_else_gets_a_picture_of_its_own(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.setdefault(self, a) and plot(self, *a, **k))
    runs = [Run(arm, 0, tmp_path / arm / "seed_0") for arm in ("codec", "classifier")]
    (runs[1].folder).mkdir(parents=True)
    (runs[1].folder / "train.csv").write_text("updates,env_steps,seconds,loss\n5,0,1,4\n6,0,1,5\n")
    for run, header, values in zip(runs, ("psnr", "classes,accuracy"), ("2", "2,3")):
        write_json(run.results, {"updates": 5, "seconds": 1.0, "metrics": {}})
        (run.folder / "eval.csv").write_text(f"updates,env_steps,seconds,{header}\n5,0,1,{values}\n")
    config = {
        "name": "name",
        "summary": "A summary.",
        "notes": [],
        "curves_against": "classes",
        "training_curves": ["loss"],
    }
    write_report(OmegaConf.create(config), ["experiment=name"], runs, tmp_path)
    assert {axis.get_title(): (axis.get_xlabel(), *points) for axis, points in drawn.items()} == {
        "accuracy": ("classes", [2.0], [3.0]),
        "psnr": ("updates", [5.0], [2.0]),
        "train/loss": ("updates", [5.0, 6.0], [4.0, 5.0]),
    }
    report = (tmp_path / "report.md").read_text()
    assert report.index("](learning_curves.png)") < report.index("](learning_curves_2.png)")
    assert (tmp_path / "learning_curves_2.png").exists()


def test_what_language_models_said_stands_beside_each_other(tmp_path):
    runs = [Run(arm, seed, tmp_path / arm / f"seed_{seed}") for arm in ("base", "svf") for seed in range(2)]
    for run in runs:
        write_json(run.results, {"updates": 5, "seconds": 1.0, "metrics": {"x": [1.0]}})
        said = {"question": "a|b?", "answer": "a", "completion": f" {run.arm}\n{run.seed}.", "right": run.arm == "svf"}
        write_json(run.folder / "completions.json", {"sums": [said]})
    config = {"name": "name", "summary": "A summary.", "notes": [], "curves_against": None, "training_curves": []}
    write_report(OmegaConf.create(config), ["experiment=name"], runs, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| sums | answer | base | svf |\n|---|---|---|---|\n| a\\|b? | a | base 0. ✗ | svf 0. ✓ |\n" in report
    assert "base 1." not in report
