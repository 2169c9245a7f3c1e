"""The report over the runs of an experiment."""

import json

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
    config = OmegaConf.create({"name": "name", "summary": "A summary.", "notes": []})
    write_report(config, ["experiment=name"], runs, tmp_path)
    arm = json.loads((tmp_path / "results.json").read_text())["arms"]["arm"]
    assert arm["task/return"] == {"mean": 3.5, "stderr": 1.5, "n": 2}
    assert (arm["old"]["mean"], arm["old"]["n"]) == (5.0, 1)
    assert (arm["new"]["mean"], arm["new"]["n"]) == (7.0, 1)
    report = (tmp_path / "report.md").read_text()
    assert "```bash\npython train.py experiment=name\n```" in report
    assert "| task | 3.50 ± 1.50 |" in report
