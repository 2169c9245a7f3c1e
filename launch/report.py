"""The report of an experiment: results.json, tables in report.md, and learning curves."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from components.files import read_json
from components.wording import counted, size
from launch.curves import draw_curves
from launch.files import COMPLETION_RESULTS, COMPLETIONS, REFERENCE_RESULTS, read_results, write_json, write_text
from launch.overrides import NEUTRAL, command, departures
from launch.resumptions import sentences
from launch.statistics import LEVEL, RESAMPLES, bootstrap_interval, interquartile_mean

REFERENCES = "references.json"
PICTURES = {
    "rewards.png": "Reward at every step of the episodes of {}, mean and range",
    "films/contact_sheet.png": "Moments of the first episode of {} for each reward; films of its beginning lie beside",
    "reconstructions.png": "What {} keeps of images",
    "confusion.png": "What {} takes questions for, a row for each family and its kind",
    "feature_gradients.png": "What the critics' loss asks of the feature maps of {}, each on a scale of its own",
}
# The first words of overrides that change nothing which the notes speak of, beside those that are neutral.
HOW_LONG = ("num_seeds", "threads", "trainer", "callbacks", "checkpoint_every")


def write_report(
    config: DictConfig,
    overrides: Sequence[str],
    runs: Sequence[Any],
    folder: Path,
    remarks: Sequence[str] = (),
    resumed: Sequence[Mapping[str, Any]] = (),
    packages: Collection[str] = (),
) -> None:
    """Summarise the runs of an experiment, which `overrides` composed, in its folder.

    Statistics are over seeds, each seed being the mean of its episodes; with one seed they are over its episodes, as
    those of references always are, and `over` says so.

    Args:
        remarks: what is to be said of these very runs, beside the experiment's notes.
        resumed: what was changed while they were made, see `launch.resumptions.RESUMED`.
        packages: a person's own that they are made of.
    """
    results = {run: read_results(run.results) for run in runs}
    seeds = sorted({run.seed for run in runs})
    found: dict[str, dict[str, dict[int, list[float]]]] = {run.arm: {} for run in runs}  # by arm, metric and seed
    for run, result in results.items():
        for metric, values in result["metrics"].items():
            found[run.arm].setdefault(metric, {})[run.seed] = values
    arms = {
        arm: {metric: _of_runs(by_seed, len(seeds)) for metric, by_seed in metrics.items()}
        for arm, metrics in found.items()
    }
    aggregate = {arm: one for arm, metrics in arms.items() if (one := _aggregate(metrics, config.aggregate))}
    contrasts = {name: found for name, weights in config.contrasts.items() if (found := _contrast(arms, weights))}
    if (folder / REFERENCES).exists():
        for arm, metrics in read_json(folder / REFERENCES, REFERENCE_RESULTS).items():
            arms[arm] = {metric: _spread(values, "episodes") for metric, values in metrics.items()}
    summary = {
        "experiment": config.name,
        "seeds": seeds,
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "arms": arms,
        "aggregate": aggregate,
        "contrasts": contrasts,
        "resumed": [one for one in resumed if one["run"] in {run.name for run in runs}],
        "provenance": _made_by(results),
    }
    write_json(folder / "results.json", summary)
    curves = draw_curves(config, runs, arms, folder)
    made_by = command("train", overrides, packages)
    write_text(folder / "report.md", _markdown(config, overrides, made_by, remarks, summary, results, curves, folder))


def write_evaluation(title: str, made_by: str, rewards: Mapping[str, Mapping[str, str]], folder: Path) -> str:
    """The report of one evaluated checkpoint in its folder, beside its results.json; returns the table in it.

    Args:
        made_by: the command.
        rewards: tasks or expressions, by protocol and name.
    """
    result = read_results(folder / "results.json")
    table = ["| metric | mean | episodes |", "|---|---:|---:|"]
    for name, values in result["metrics"].items():
        spread = _spread(values, "episodes")
        table.append(f"| {name} | {_cell(spread)} | {spread['n']} |")
    lines = [f"# {title}", "", "```bash", made_by, "```", ""]
    for protocol, named in rewards.items():
        each = [f"`{name}`" if name == reward else f"`{name}`, which is `{reward}`" for name, reward in named.items()]
        lines += [f"From the starts of `{protocol}`: {'; '.join(each)}.", ""]
    spread = any(len(values) > 1 for values in result["metrics"].values())
    lines += [*(["Mean ± standard error over episodes.", ""] if spread else []), *table, ""]
    for name, what in PICTURES.items():
        picture = folder / Path(name).name
        if picture.exists():
            lines += [f"{what.format('this evaluation')}:", "", f"![{picture.stem}]({picture.name})", ""]
    if result["provenance"] is not None:
        lines += _provenance([result["provenance"]])
    write_text(folder / "report.md", "\n".join(lines))
    return "\n".join(table)


def _of_runs(by_seed: Mapping[int, Sequence[float]], seeds: int) -> dict[str, Any]:
    """A metric of an arm, from its values of each seed; the seeds of the study may be more than those that have it."""
    means = {str(seed): sum(values) / len(values) for seed, values in sorted(by_seed.items())}
    if seeds == 1:
        return {**_spread(*by_seed.values(), "episodes"), "by_seed": means}
    return {**_spread(list(means.values()), "seeds"), "by_seed": means, **_interquartile([*zip(means.values())])}


def _spread(values: Sequence[float], over: str) -> dict[str, Any]:
    count = len(values)
    mean = sum(values) / count
    squares = sum((value - mean) ** 2 for value in values)
    stderr = math.sqrt(squares / (count - 1) / count) if count > 1 else None  # one value does not tell
    return {"mean": mean, "stderr": stderr, "n": count, "over": over}


def _interquartile(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of scores [seeds, tasks]; other seeds than one can't be told of."""
    interval = list(bootstrap_interval(scores)) if len(scores) > 1 else None
    return {"iqm": float(interquartile_mean(np.ravel(scores))), "interval": interval}


def _aggregate(metrics: Mapping[str, Mapping[str, Any]], pattern: str | None) -> dict[str, Any] | None:
    """Scores of an arm on several tasks, `metrics` that match the pattern, in one number; None if they are not several.

    Seeds that lack a task are left out.
    """
    tasks = [metric for metric in metrics if pattern is not None and fnmatch(metric, str(pattern))]
    if len(tasks) < 2:
        return None
    seeds = set.intersection(*(set(metrics[task]["by_seed"]) for task in tasks))
    scores = [[metrics[task]["by_seed"][seed] for task in tasks] for seed in sorted(seeds, key=int)]
    return {"tasks": tasks, "n": len(scores), **_interquartile(scores)} if scores else None


def _contrast(arms: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """A weighted sum of arms, metric by metric, of each seed with itself; none where one of the arms was not run."""
    if not weights or not weights.keys() <= arms.keys():
        return {}
    found = {}
    for metric in arms[next(iter(weights))]:
        each = [arms[arm].get(metric, {"by_seed": {}})["by_seed"] for arm in weights]
        seeds = sorted(set.intersection(*map(set, each)), key=int)
        sums = {seed: sum(w * means[seed] for w, means in zip(weights.values(), each)) for seed in seeds}
        if sums:
            values = list(sums.values())
            found[metric] = {**_spread(values, "seeds"), "by_seed": sums, **_interquartile([[each] for each in values])}
    return found


def _made_by(results: Mapping[Any, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What made the results: once for all runs, or several with the runs of each."""
    runs: dict[str, list[str]] = {}
    for run, result in results.items():
        if result["provenance"] is not None:
            runs.setdefault(json.dumps(result["provenance"]), []).append(run.name)
    return [{**json.loads(made), "runs": names} for made, names in runs.items()]


def _markdown(
    config: DictConfig,
    overrides: Sequence[str],
    made_by: str,
    remarks: Sequence[str],
    summary: Mapping[str, Any],
    results: Mapping[Any, Mapping[str, Any]],
    curves: Sequence[str],
    folder: Path,
) -> str:
    arms, seeds, runs = summary["arms"], summary["seeds"], list(results)
    lines = [f"# {config.name}", "", config.summary, "", "```bash", made_by, "```", ""]
    for sentence in sentences(summary["resumed"], len(runs)):
        lines += [sentence, ""]
    named = f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    lines += [f"{named}; {_over(arms, seeds)}.", ""]
    lines += _table(arms, lambda value: _cell(value, len(seeds)))
    for remark in [*_notes(config.notes, overrides), *remarks]:
        lines += [remark, ""]
    lines += _intervals(summary)
    lines += _contrasts(summary["contrasts"], config.contrasts)
    lines += [f"Training and evaluation took {_times(results)}.", ""]
    for name in curves:
        lines += [f"![learning curves]({name})", ""]
    if curves and len(seeds) > 1:
        lines += ["Curves are means over seeds, bands a standard error to either side.", ""]
    lines += _completions(runs)
    for name, what in PICTURES.items():
        for run in runs:
            picture = run.folder / name
            if picture.exists():
                lines += [f"{what.format(f'{run.arm}, seed {run.seed}')}:", ""]
                lines += [f"![{picture.stem} of {run.arm}, seed {run.seed}]({picture.relative_to(folder)})", ""]
    if len(seeds) > 1:
        lines += [f"Each seed, {' / '.join(map(str, seeds))}:", ""]
        lines += _table(_trained(arms), lambda value: _each_seed(value, seeds))
    return "\n".join([*lines, *_provenance(summary["provenance"])])


def _over(arms: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """What numbers are means of, and what of their spread is told."""
    if all(value["stderr"] is None for metrics in arms.values() for value in metrics.values()):
        return "one value each, of which no spread is known"
    if len(seeds) == 1:
        return "mean ± standard error over episodes"
    without = "; (episodes): over those, for want of seeds" * (len(_trained(arms)) < len(arms))
    return f"mean ± standard error over seeds, each being the mean of its episodes{without}"


def _trained(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Arms that are no references."""
    return {arm: metrics for arm, metrics in arms.items() if all("by_seed" in value for value in metrics.values())}


def _notes(notes: Sequence[str], overrides: Sequence[str]) -> list[str]:
    changed = [f"`{override}`" for override in departures(overrides, (*NEUTRAL, *HOW_LONG))]
    if not notes or not changed:
        return list(notes)
    return [f"The experiment's notes, written for its own settings and not for {', '.join(changed)}:", *notes]


def _table(arms: Mapping[str, Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Metrics by arms, and an empty line."""
    lines = [f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    for metric in dict.fromkeys(metric for metrics in arms.values() for metric in metrics):
        cells = [cell(metrics[metric]) if metric in metrics else "-" for metrics in arms.values()]
        lines.append(f"| {metric.removesuffix('/return')} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(value: Mapping[str, Any], seeds: int = 1) -> str:
    digits = _digits(value["mean"])
    text = f"{value['mean']:.{digits}f}"
    if value["stderr"] is not None:
        text += f" ± {value['stderr']:.{digits}f}"
        text += " (episodes)" * (seeds > 1 and value["over"] == "episodes")
    some = value["over"] == "seeds" and value["n"] < seeds  # the others had no such number
    return f"{text} (n={value['n']})" if some else text


def _digits(size: float) -> int:
    return 0 if abs(size) >= 100 else 1 if abs(size) >= 10 else 2 if abs(size) >= 1 else 3


def _each_seed(value: Mapping[str, Any], seeds: Sequence[int]) -> str:
    means, digits = value["by_seed"], _digits(value["mean"])
    return " / ".join(f"{means[str(seed)]:.{digits}f}" if str(seed) in means else "-" for seed in seeds)


def _intervals(summary: Mapping[str, Any]) -> list[str]:
    """Interquartile means of all tasks together, and of every metric over seeds, where there are several."""
    several = len(summary["seeds"]) > 1
    rows = {
        arm: {f"{len(found['tasks'])} tasks together": found for found in [summary["aggregate"].get(arm)] if found}
        | (metrics if several else {})
        for arm, metrics in _trained(summary["arms"]).items()
    }
    if not any(rows.values()):
        return []
    over = " and ".join(["seeds"] * several + ["tasks"] * bool(summary["aggregate"]))
    interval = f" [{100 * LEVEL:.0f} % interval, by a stratified bootstrap of {RESAMPLES:,} resamples]" * several
    few = "; of few seeds it is too narrow (docs/reports.md)" * (1 < len(summary["seeds"]) < 5)
    return [f"Interquartile mean over {over}{interval}{few}:", "", *_table(rows, _interval)]


def _contrasts(found: Mapping[str, Any], weights: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Weighted sums of arms, seed by seed."""
    if not found:
        return []

    def term(arm: str, weight: float) -> str:
        return f"{'-' if weight < 0 else '+'}{'' if abs(weight) == 1 else f'{abs(weight):g} '}{arm}"

    sums = [f"{name} is {' '.join(term(*each) for each in weights[name].items())}" for name in found]
    several = any(value["interval"] is not None for metrics in found.values() for value in metrics.values())
    over = f" (mean ± standard error over seeds, and interquartile mean [{100 * LEVEL:.0f} % interval])" * several
    lines = [f"Arms against each other, every seed with itself{over}: {'; '.join(sums)}.", ""]
    return [*lines, *_table(found, lambda value: f"{_cell(value)}, {_interval(value)}" if several else _cell(value))]


def _interval(value: Mapping[str, Any]) -> str:
    digits = _digits(value["iqm"])
    ends = "" if value["interval"] is None else " [{:.{d}f}, {:.{d}f}]".format(*value["interval"], d=digits)
    return f"{value['iqm']:.{digits}f}{ends}"


def _times(results: Mapping[Any, Mapping[str, Any]]) -> str:
    seconds: dict[tuple[str, int], list[str]] = {}
    for run, result in results.items():
        seconds.setdefault((run.arm, result["updates"]), []).append(
            f"{result['seconds']:.{int(result['seconds'] < 10)}f}"
        )
    return "; ".join(
        f"{arm} {', '.join(each)} s ({counted(updates, 'update')})" for (arm, updates), each in seconds.items()
    )


def _provenance(made: Sequence[Mapping[str, Any]]) -> list[str]:
    """A paragraph for each entry."""
    lines = []
    for each in made:
        hardware = each["hardware"]
        code = each["code"].removesuffix("+") + ", with uncommitted changes" * each["code"].endswith("+")
        versions = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        devices = ", ".join([f"{counted(hardware['cores'], 'core')} of {hardware['cpu']}", *hardware["gpus"]])
        whose = f" ({', '.join(each['runs'])})" if len(made) > 1 else ""
        lines += [
            f"Made{whose} by tenfold {code}; {versions}; on {devices}, {size(1e9 * hardware['memory_gb'])} of memory, "
            f"{counted(hardware['threads'], 'thread')}.",
            "",
        ]
    return lines


def _completions(runs: Sequence[Any]) -> list[str]:
    """Tables of what the language models of the first seed's runs said to the first questions of each test."""
    first = [run for run in runs if run.seed == runs[0].seed and (run.folder / COMPLETIONS).exists()]
    said = {run.arm: read_json(run.folder / COMPLETIONS, COMPLETION_RESULTS) for run in first}
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
