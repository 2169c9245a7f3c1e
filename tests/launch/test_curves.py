"""Learning curves: what is drawn, where, and how it is told apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from omegaconf import OmegaConf

from launch.arms import Run
from launch.curves import draw_curves


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict[Any, Any]]:
    """What is drawn, by panel and label: points, bands and level lines."""
    found: dict[str, dict[Any, Any]] = {"lines": {}, "bands": {}, "levels": {}}
    plot, band, level = Axes.plot, Axes.fill_between, Axes.axhline

    def keep_plot(self, x, y, **look):
        found["lines"][self, look["label"]] = (list(x), list(y), look)
        return plot(self, x, y, **look)

    def keep_band(self, x, low, high, **look):
        found["bands"][self, to_hex(look["color"])] = (list(low), list(high))
        return band(self, x, low, high, **look)

    def keep_level(self, y, **look):
        found["levels"][self, look["label"]] = y
        return level(self, y, **look)

    for name, keep in (("plot", keep_plot), ("fill_between", keep_band), ("axhline", keep_level)):
        monkeypatch.setattr(Axes, name, keep)
    return found


@pytest.fixture
def draw(tmp_path) -> Callable[..., list[str]]:
    """Draws runs by what their logs hold, ARM/SEED -> {file: text}."""

    def write(logs: dict[str, dict[str, str]], arms: dict[str, Any] | None = None, **settings: Any) -> list[str]:
        runs = []
        for name, files in logs.items():
            arm, seed = name.split("/")
            runs.append(Run(arm, int(seed), tmp_path / arm / f"seed_{seed}"))
            runs[-1].folder.mkdir(parents=True)
            for file, text in files.items():
                (runs[-1].folder / f"{file}.csv").write_text(text)
        config = {"curves_against": None, "training_curves": [], **settings}
        return draw_curves(OmegaConf.create(config), runs, arms or {}, tmp_path)

    return write


def log(header: str, *rows: str) -> str:
    return "\n".join([f"updates,env_steps,seconds,{header}", *rows]) + "\n"


def by_title(drawn: dict[Any, Any]) -> dict[tuple[str, str], Any]:
    return {(axis.get_title(), label): value for (axis, label), value in drawn.items()}


def test_curves_are_means_over_seeds_with_bands_of_a_standard_error(draw, drawn, tmp_path: Path):
    seeds = {f"arm/{seed}": {"eval": log("score", f"5,0,1,{seed}", f"10,0,1,{2 * seed}")} for seed in range(3)}
    seeds["arm/2"]["eval"] += "15,0,1,9\n"  # went on for longer
    assert draw({**seeds, "one/0": {"eval": log("score", "5,0,1,7", "10,0,1,8")}}) == ["learning_curves.png"]
    lines = by_title(drawn["lines"])
    assert lines["score", "arm"][:2] == ([5.0, 10.0], [1.0, 2.0])
    assert lines["score", "one"][:2] == ([5.0, 10.0], [7.0, 8.0])
    ((low, high),) = drawn["bands"].values()  # a single seed has none
    assert low == pytest.approx([1 - 3**-0.5, 2 - 2 * 3**-0.5])
    assert high == pytest.approx([1 + 3**-0.5, 2 + 2 * 3**-0.5])
    for name in ("learning_curves.png", "learning_curves.pdf"):
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("count", [6, 8, 17])
def test_an_arm_looks_the_same_in_all_panels_and_unlike_the_others(draw, drawn, count):
    def metrics(arm: int) -> str:
        return "b,c" if arm == 0 else "c,b"  # in whichever order they come

    logs = {f"arm_{arm}/0": {"eval": log(metrics(arm), "5,0,1,1,2", "10,0,2,1,2")} for arm in range(count)}
    draw(logs)
    looks: dict[str, set[tuple[str, str, str]]] = {}
    for (_, arm), (_, _, look) in drawn["lines"].items():
        looks.setdefault(arm, set()).add((to_hex(look["color"]), look["linestyle"], look["marker"]))
    assert all(len(look) == 1 for look in looks.values())
    assert len({next(iter(look))[:2] for look in looks.values()}) == count


def test_an_arm_that_has_no_curve_is_a_line_beside_those_that_have(draw, drawn):
    curve = {"eval": log("accuracy", "5,0,1,60", "10,0,1,80")}
    draw({"learned/0": curve, "base/0": {}}, {"base": {"accuracy": {"mean": 50.0}}, "learned": {}})
    assert by_title(drawn["levels"]) == {("accuracy", "base"): 50.0}


def test_what_is_drawn_against_something_else_gets_a_picture_of_its_own(draw, drawn, tmp_path):
    logs = {
        "codec/0": {"eval": log("psnr", "5,0,1,2", "6,0,1,3")},
        "classifier/0": {
            "eval": log("classes,accuracy", "5,0,1,2,3", "6,0,1,4,5"),
            "train": log("loss", "5,0,1,4", "6,0,1,5"),
        },
    }
    names = draw(logs, curves_against="classes", training_curves=["loss"])
    assert names == ["learning_curves.png", "learning_curves_2.png"]
    found = {(axis.get_ylabel(), axis.get_xlabel()): line[:2] for (axis, _), line in drawn["lines"].items()}
    assert found == {
        ("accuracy", "classes"): ([2.0, 4.0], [3.0, 5.0]),
        ("psnr", "updates"): ([5.0, 6.0], [2.0, 3.0]),
        ("loss", "updates"): ([5.0, 6.0], [4.0, 5.0]),
    }
    assert [axis.get_title() for axis, _ in drawn["lines"]] == ["accuracy", "psnr", "training"]
    assert all((tmp_path / name).exists() for name in names)


def test_experience_is_the_clock_where_it_is_gathered(draw, drawn):
    draw({"arm/0": {"eval": log("fast_start/run_on/return", "5,100000,1,2", "10,200000,1,4")}})
    (((axis, _), (instants, _, _)),) = drawn["lines"].items()
    assert (instants, axis.get_xlabel()) == ([100000.0, 200000.0], "environment steps")
    assert (axis.get_title(), axis.get_ylabel()) == ("fast start: run on", "return")
    assert "200k" in [label.get_text() for label in axis.get_xticklabels()]


def test_what_was_measured_once_is_no_curve(draw, drawn):
    logs = {
        "arm/0": {"eval": log("a,once", "5,0,1,2,", "10,0,1,4,5")},
        "short/0": {"eval": log("a,once", "5,0,1,2,3")},  # beside a curve, a marker
    }
    draw(logs)
    assert set(by_title(drawn["lines"])) == {("a", "arm"), ("a", "short")}


@pytest.mark.parametrize("evaluated", [{}, {"eval": log("score", "5,0,1,2")}])
def test_nothing_to_draw_is_no_picture(draw, tmp_path, evaluated):
    assert draw({"arm/0": evaluated}) == []
    assert not list(tmp_path.glob("*.p*"))
