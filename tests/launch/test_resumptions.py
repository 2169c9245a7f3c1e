"""What is remembered of resumptions that changed something."""

import pytest

from launch.resumptions import changes, history, in_words, sentences
from launch.runs import merged, read_resumed, write_overrides

BEGAN = {"module": {"rate": 3e-4, "heads": None}, "datamodule": {"folder": "x"}, "trainer": {"devices": 1}}
FASTER = {**BEGAN, "module": {"rate": 1e-3, "heads": None}}
RATE = {"module.rate": {"before": 3e-4, "now": 1e-3}}


def entry(updates: int, changed: dict = RATE, run: str = "a/seed_0") -> dict:
    return {"run": run, "updates": updates, "changes": changed}


def test_changes_are_told_by_key_as_they_would_be_typed():
    now = {**FASTER, "module": {**FASTER["module"], "heads": True, "name": "x"}, "trainer": {"devices": 2}}
    found = in_words(changes(BEGAN, now))
    expected = "module.rate=0.001 (was 0.0003), module.heads=true (was null), trainer.devices=2 (was 1)"
    assert found == f" with {expected}, module.name=x (was null)"
    assert changes(BEGAN, BEGAN) == {}
    assert in_words({}) == ""
    older = {part: BEGAN[part] for part in ("module", "datamodule")}  # did not say how it was trained
    assert changes(older, {**BEGAN, "trainer": {"devices": 2}}) == {}


@pytest.mark.parametrize(
    ("former", "saved", "recipe", "expected"),
    [
        ([], (200, BEGAN), BEGAN, []),
        ([], (200, BEGAN), FASTER, [entry(200)]),
        ([entry(200)], (300, FASTER), FASTER, [entry(200)]),
        # Killed before it took a checkpoint: as asked for again, and as it was before.
        ([entry(200)], (200, BEGAN), FASTER, [entry(200)]),
        ([entry(200)], (200, BEGAN), BEGAN, []),
        ([entry(200)], (200, FASTER), FASTER, [entry(200)]),
        ([entry(200)], (100, BEGAN), BEGAN, []),  # from an older copy
        ([entry(200), entry(100, run="b/seed_0")], None, FASTER, [entry(100, run="b/seed_0")]),
    ],
)
def test_history_is_what_the_weights_were_made_with(former, saved, recipe, expected):
    state = None if saved is None else {"updates": saved[0], "recipe": saved[1]}
    assert history(former, "a/seed_0", state, recipe) == expected


def test_history_stands_beside_the_overrides_and_nothing_does_where_nothing_changed(tmp_path):
    overrides = ["experiment=x", "module.updates=5"]
    write_overrides(tmp_path, overrides)
    plain = (tmp_path / "run.yaml").read_text()
    assert plain == "overrides:\n- experiment=x\n- module.updates=5\n"  # as all runs had it
    assert read_resumed(tmp_path) == read_resumed(tmp_path / "none") == []
    write_overrides(tmp_path, overrides, [entry(200), entry(300, {"module.heads": {"before": None, "now": [1]}})])
    assert [one["updates"] for one in read_resumed(tmp_path)] == [200, 300]
    assert read_resumed(tmp_path)[0] == entry(200)
    assert merged(tmp_path, []) == overrides
    (tmp_path / "run.yaml").write_text(f"{plain}resumed:\n- run: a\n  updates: -1\n")
    with pytest.raises(
        ValueError,
        match=r"run.yaml.resumed\[0\].updates: expected a whole number from 0 to 9223372036854775807, found -1",
    ):
        read_resumed(tmp_path)


def test_a_change_is_one_sentence_that_names_its_runs_among_several():
    told = [entry(1200), entry(1200, run="b/seed_0"), entry(5, run="b/seed_0")]
    assert sentences(told[:1], 1) == ["Resumed after 1,200 updates with module.rate=0.001 (was 0.0003)."]
    assert sentences(told, 2) == [
        "Resumed (a/seed_0, b/seed_0) after 1,200 updates with module.rate=0.001 (was 0.0003).",
        "Resumed (b/seed_0) after 5 updates with module.rate=0.001 (was 0.0003).",
    ]
