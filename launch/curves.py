"""Pictures of how an experiment's runs learned."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from callbacks.run_log import read_rows
from components.files import replacing
from launch.plots import STYLE, grid, heading, look

Lines = list[tuple[list[float], list[float]]]  # instants and values of each seed


def draw_curves(
    config: DictConfig, runs: Sequence[Any], arms: Mapping[str, Mapping[str, Any]], folder: Path
) -> list[str]:
    """Pictures of every metric against environment steps, or updates where none are taken, as PNG and as PDF.

    Beside what was evaluated come the training metrics that `config.training_curves` names. What was measured no more
    than once is left to tables.

    Where the metric that `config.curves_against` names was recorded, the others are drawn against it, in a picture of
    their own that comes first. No pictures without curves.

    Args:
        arms: of results.json; those without curves are drawn as level lines.

    Returns:
        the names of the PNG files.
    """
    curves: dict[str, dict[str, dict[str, Lines]]] = {}  # by what they are drawn against, by metric and by arm
    for run in runs:
        logs = [run.folder / f"{kind}.csv" for kind in ("eval", "train")]
        evaluated, learned = (read_rows(path)[1] if path.exists() else [] for path in logs)
        clocks = ("updates", "env_steps", "seconds", config.curves_against)
        columns = [(evaluated, name, name) for name in (evaluated[0] if evaluated else ()) if name not in clocks]
        columns += [
            (learned, name, f"training/{name}") for name in config.training_curves if learned and name in learned[0]
        ]
        for rows, column, metric in columns:
            clock = "env_steps" if int(rows[-1]["env_steps"]) else "updates"
            clock = config.curves_against if config.curves_against in rows[0] else clock
            points = [(float(row[clock]), float(row[column])) for row in rows if row[column]]
            by_arm = curves.setdefault(clock, {}).setdefault(metric, {})
            by_arm.setdefault(run.arm, []).append(tuple(map(list, zip(*points))))
    trained = list(dict.fromkeys(run.arm for run in runs))
    for clock, metrics in list(curves.items()):
        curves[clock] = {
            metric: by_arm
            for metric, by_arm in metrics.items()
            if any(len(instants) > 1 for lines in by_arm.values() for instants, _ in lines)
        }
    names = []
    for clock in sorted(filter(curves.get, curves), key=lambda clock: clock != config.curves_against):
        names.append(f"learning_curves{f'_{len(names) + 1}' * bool(names)}.png")
        _draw(curves[clock], clock.split("/")[-1].replace("env_", "environment "), trained, arms, folder / names[-1])
    return names


def _draw(
    curves: Mapping[str, Mapping[str, Lines]],
    clock: str,
    trained: Sequence[str],
    arms: Mapping[str, Mapping[str, Any]],
    path: Path,
) -> None:
    """One picture, all arms and references in each of its panels, an arm looking the same in all of them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    crowded = max(len(by_arm) for by_arm in curves.values()) > 6
    most, scale = (3, 1.5) if crowded else (4, 1.0)
    scale = 2.4 if crowded and len(curves) == 1 else scale
    rows, columns = grid(len(curves), most)
    with rc_context(STYLE):
        figure = Figure(figsize=(scale * 3.2 * columns, scale * 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (metric, by_arm) in zip(axes, curves.items()):
            for arm, lines in by_arm.items():
                _draw_arm(axis, arm, lines, look(trained.index(arm)))
            still = [(arm, metrics) for arm, metrics in arms.items() if arm not in by_arm and metric in metrics]
            for index, (arm, metrics) in enumerate(still):
                axis.axhline(metrics[metric]["mean"], color="0.4", linestyle=("--", ":", "-.")[index % 3], label=arm)
            task, _, quantity = metric.rpartition("/")
            axis.set_title(heading(task or quantity))
            axis.set_ylabel(heading(quantity))
            if quantity == "return":
                axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
            axis.set_xlabel(clock)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            if clock in ("updates", "environment steps"):
                axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k
        for axis in axes[len(curves) :]:
            axis.set_axis_off()
        entries = {}
        for axis in axes:  # not every arm has every metric
            entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
        labels = [*(arm for arm in trained if arm in entries), *(label for label in entries if label not in trained)]
        handles = [entries[label] for label in labels]
        fitting = max(2, int(figure.get_figwidth() / 1.6))
        figure.legend(handles, labels, loc="outside lower center", ncols=min(fitting, len(labels)), frameon=False)
        for file in (path, path.with_suffix(".pdf")):
            with replacing(file) as temporary:
                figure.savefig(temporary, dpi=150, format=file.suffix[1:])
            figure.set_layout_engine("none")  # as it was laid out, once


def _draw_arm(axis: Any, arm: str, lines: Lines, style: Mapping[str, str]) -> None:
    """The mean over seeds, with a band of a standard error on either side where there are several."""
    shared = sorted(set.intersection(*(set(instants) for instants, _ in lines)))
    values = np.array([[dict(zip(*line))[instant] for instant in shared] for line in lines])  # [seeds, instants]
    mean = values.mean(0)
    axis.plot(shared, mean, label=arm, **style if len(shared) <= 30 else {**style, "marker": ""})
    if len(lines) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(lines))
        axis.fill_between(shared, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
