"""The report of an experiment: results.json, a table in report.md, and learning curves."""

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from components.files import replacing
from launch.files import write_json, write_text

REFERENCES = "references.json"
COMPLETIONS = "completions.json"
PICTURES = {
    "films/contact_sheet.png": "Films of {}, moments of the first episode",
    "reconstructions.png": "What {} keeps of images",
    "confusion.png": "What {} takes questions for, a row for each family and its kind",
    "feature_gradients.png": "What the critics' loss asks of the feature maps of {}, each on a scale of its own",
}


def write_report(config: DictConfig, overrides: Sequence[str], runs: Sequence[Any], folder: Path) -> None:
    """Summarise the runs of an experiment, which `overrides` composed, in its folder.

    A metric's mean, standard error and count are over seeds, each seed being the mean of its episodes; with one seed
    they are over its episodes.
    """
    results = {run: json.loads(run.results.read_text()) for run in runs}
    arms: dict[str, dict[str, dict[str, float]]] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        seeds = [results[run]["metrics"] for run in runs if run.arm == arm]
        metrics = dict.fromkeys(metric for seed in seeds for metric in seed)
        arms[arm] = {metric: _summary([seed[metric] for seed in seeds if metric in seed]) for metric in metrics}
    if (folder / REFERENCES).exists():
        for arm, metrics in json.loads((folder / REFERENCES).read_text()).items():
            arms[arm] = {metric: _summary([values]) for metric, values in metrics.items()}
    summary = {
        "experiment": config.name,
        "seeds": sorted({run.seed for run in runs}),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "arms": arms,
    }
    write_json(folder / "results.json", summary)
    curves = _plot_curves(config, runs, arms, folder)
    write_text(folder / "report.md", _markdown(config, overrides, summary, runs, curves, folder))


def metrics_table(path: Path) -> str:
    """The metrics of one evaluated run (its results.json) as a table."""
    metrics = json.loads(path.read_text())["metrics"]
    lines = ["| metric | mean | episodes |", "|---|---:|---:|"]
    for name, values in metrics.items():
        summary = _summary([values])
        lines.append(f"| {name} | {_cell(summary)} | {summary['n']} |")
    return "\n".join(lines)


def _summary(seeds: Sequence[Sequence[float]]) -> dict[str, float]:
    values = [sum(seed) / len(seed) for seed in seeds] if len(seeds) > 1 else list(seeds[0])
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / len(values)), "n": len(values)}


def _markdown(
    config: DictConfig,
    overrides: Sequence[str],
    summary: Mapping[str, Any],
    runs: Sequence[Any],
    curves: Sequence[str],
    folder: Path,
) -> str:
    arms = summary["arms"]
    metrics = list(dict.fromkeys(metric for arm in arms.values() for metric in arm))
    several = len(summary["seeds"]) > 1
    command = shlex.join(["python", "train.py", *overrides])
    lines = [f"# {config.name}", "", config.summary, "", "```bash", command, "```", ""]
    lines += [f"Seeds {summary['seeds']}; mean ± standard error over {'seeds' if several else 'episodes'}.", ""]
    lines += [f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    for metric in metrics:
        cells = [_cell(arm.get(metric), len(summary["seeds"])) for arm in arms.values()]
        lines.append(f"| {metric.removesuffix('/return')} | {' | '.join(cells)} |")
    lines.append("")
    for note in config.notes:
        lines += [note, ""]
    lines += [f"Training and evaluation took {_times(runs)}.", ""]
    for name in curves:
        lines += [f"![learning curves]({name})", ""]
    lines += _completions(runs)
    for name, what in PICTURES.items():
        for run in runs:
            picture = run.folder / name
            if picture.exists():
                lines += [f"{what.format(f'{run.arm}, seed {run.seed}')}:", ""]
                lines += [f"![{picture.stem} of {run.arm}, seed {run.seed}]({picture.relative_to(folder)})", ""]
    return "\n".join(lines)


def _cell(value: Mapping[str, float] | None, seeds: int = 1) -> str:
    if value is None:
        return "-"
    if value["n"] < seeds:  # some had no such number
        return f"{_cell(value)} (n={value['n']})"
    digits = 0 if abs(value["mean"]) >= 100 else 1 if abs(value["mean"]) >= 10 else 2 if abs(value["mean"]) >= 1 else 3
    if value["n"] == 1:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ± {value['stderr']:.{digits}f}"


def _completions(runs: Sequence[Any]) -> list[str]:
    """Tables of what the language models of the first seed's runs said to the first questions of each test."""
    first = [run for run in runs if run.seed == runs[0].seed and (run.folder / COMPLETIONS).exists()]
    said = {run.arm: json.loads((run.folder / COMPLETIONS).read_text()) for run in first}
    lines = []
    for test in dict.fromkeys(test for tests in said.values() for test in tests):
        arms = [arm for arm, tests in said.items() if test in tests]
        lines += [f"| {test} | answer | {' | '.join(arms)} |", f"|---|---|{'---|' * len(arms)}"]
        for rows in zip(*(said[arm][test] for arm in arms)):
            texts = [f"{_in_cell(row['completion'])} {'✓' if row['right'] else '✗'}" for row in rows]
            cells = [_in_cell(rows[0]["question"]), _in_cell(rows[0]["answer"]), *texts]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _in_cell(text: str) -> str:
    """As it fits into a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _times(runs: Sequence[Any]) -> str:
    parts = []
    for run in runs:
        result = json.loads(run.results.read_text())
        parts.append(f"{result['seconds']:.0f} s for {result['updates']} updates ({run.arm}, seed {run.seed})")
    return "; ".join(parts)


def _plot_curves(
    config: DictConfig, runs: Sequence[Any], arms: Mapping[str, Mapping[str, Any]], folder: Path
) -> list[str]:
    """Pictures of every metric against environment steps, or updates where none are taken.

    Beside what was evaluated come the training metrics that `config.training_curves` names.

    Where the metric that `config.curves_against` names was recorded, the others are drawn against it, in a picture of
    their own that comes first. No pictures if nothing was evaluated.
    """
    curves: dict[str, _Curves] = {}  # by what they are drawn against
    for run in runs:
        evaluated, learned = (_records(run.folder / f"{kind}.csv") for kind in ("eval", "train"))
        clocks = ("updates", "env_steps", "seconds", config.curves_against)
        columns = [(evaluated, name, name) for name in (evaluated[0] if evaluated else ()) if name not in clocks]
        columns += [
            (learned, name, f"train/{name}") for name in config.training_curves if learned and name in learned[0]
        ]
        for rows, column, metric in columns:
            clock = "env_steps" if int(rows[-1]["env_steps"]) else "updates"
            clock = config.curves_against if config.curves_against in rows[0] else clock
            points = [(float(row[clock]), float(row[column])) for row in rows if row[column]]
            by_arm = curves.setdefault(clock, {}).setdefault(metric, {})
            by_arm.setdefault(run.arm, []).append(tuple(map(list, zip(*points))))
    trained = list(dict.fromkeys(run.arm for run in runs))
    names = []
    for clock in sorted(curves, key=lambda clock: clock != config.curves_against):
        names.append(f"learning_curves{f'_{len(names) + 1}' * bool(names)}.png")
        _plot(curves[clock], clock.split("/")[-1].replace("env_", "environment "), trained, arms, folder / names[-1])
    return names


def _records(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


_Curves = dict[str, dict[str, list[tuple[list[float], list[float]]]]]  # of a metric and an arm, each seed's points


def _plot(
    curves: _Curves, clock: str, trained: Sequence[str], arms: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """One picture, all arms and references in each of its panels.

    Many arms get larger panels, with their seeds behind their mean.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    crowded = max(len(by_arm) for by_arm in curves.values()) > 6
    columns, scale = (min(3, len(curves)), 1.5) if crowded else (min(4, len(curves)), 1.0)
    scale = 2.4 if crowded and len(curves) == 1 else scale
    rows_count = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(scale * 3.4 * columns, scale * 2.7 * rows_count), layout="constrained")
    axes = figure.subplots(rows_count, columns, squeeze=False).flatten()
    colours = colormaps["tab20" if len(trained) > 10 else "tab10"].colors
    for axis, (metric, by_arm) in zip(axes, curves.items()):
        for arm, lines in by_arm.items():
            colour = colours[trained.index(arm) % len(colours)]
            several = crowded and len(lines) > 1
            for index, (instants, values) in enumerate(lines):
                look = {"alpha": 0.2} if several else {"alpha": 0.9, "marker": "."}
                axis.plot(instants, values, color=colour, label=arm if index == 0 and not several else None, **look)
            if several:
                shared = sorted(set.intersection(*(set(instants) for instants, _ in lines)))
                means = [sum(dict(zip(*line))[instant] for line in lines) / len(lines) for instant in shared]
                axis.plot(shared, means, color=colour, marker=".", label=arm)
        still = [(arm, metrics) for arm, metrics in arms.items() if arm not in by_arm and metric in metrics]
        for index, (arm, metrics) in enumerate(still):
            axis.axhline(metrics[metric]["mean"], color="0.4", linestyle=("--", ":", "-.")[index % 3], label=arm)
        axis.set_title(metric.removesuffix("/return"), fontsize=9)
        if metric.endswith("/return"):
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
        axis.set_xlabel(clock, fontsize=7)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    entries = {}
    for axis in axes:  # not every arm has every metric
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = list(entries)
    fitting = max(2, int(figure.get_figwidth() / 2))
    figure.legend(entries.values(), labels, loc="outside lower center", ncols=min(fitting, len(labels)), fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
