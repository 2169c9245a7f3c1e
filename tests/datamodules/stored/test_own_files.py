import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from datamodules.stored.own_files import read_own

ROWS = 8
#               0  1  2 | 3  4 | 5  6  7
TERMINALS = [0, 0, 0, 0, 1, 0, 0, 0]
TIMEOUTS = [0, 0, 1, 0, 0, 0, 0, 0]


def rows(n: int = ROWS, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Numbers that say where they come from."""
    time = np.arange(n)
    arrays = {
        "observations": np.stack([time, -time], axis=1),
        "actions": np.stack([time, 0 * time, -time], axis=1) / 10,
        "rewards": time + 0.25,
        "terminals": np.array(TERMINALS)[:n],
        "timeouts": np.array(TIMEOUTS)[:n],
        **changes,
    }
    return {key: np.asarray(value) for key, value in arrays.items() if value is not None}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    return path


def columns(data) -> dict[str, list]:
    """What tells rows and their ends apart."""
    names = {"row": "observation", "arrived": ("next", "observation"), "reward": ("next", "reward")}
    flags = {name: data["next", name][:, 0].nonzero().flatten().tolist() for name in ("terminated", "truncated")}
    return {
        **{name: data[key][:, 0].tolist() for name, key in names.items()},
        **flags,
        "episode": data["episode"].tolist(),
    }


@pytest.mark.parametrize("name", ["a.npz", "a.hdf5", "a.h5"])
def test_rows_without_next_observations_lead_to_the_next(name, tmp_path):
    data = read_own(write(tmp_path / name, rows())).data
    assert columns(data) == {
        "row": [0, 1, 3, 4, 5, 6],  # nobody knows where a timeout and the last row led
        "arrived": [1, 2, 4, 4, 6, 7],  # nor a terminal, but it does not matter
        "reward": [0.25, 1.25, 3.25, 4.25, 5.25, 6.25],
        "terminated": [3],
        "truncated": [1, 5],
        "episode": [0, 0, 1, 1, 2, 2],
    }
    assert data["left_out"][:, 0].nan_to_num(-1).tolist() == [-1, 2.25, -1, -1, -1, 7.25]
    torch.testing.assert_close(data["action"][:, 2], -data["observation"][:, 0] / 10)


def test_rows_that_lead_elsewhere_than_the_next_begins_are_counted(tmp_path):
    arrived = np.stack([np.arange(1, ROWS + 1), -np.arange(1, ROWS + 1)], axis=1)
    dataset = read_own(write(tmp_path / "a.npz", rows(next_observations=arrived)))
    assert dataset.loose_ends() == 0
    arrived[[2, 4, 7], 1] = 50  # ends, after which anything may begin
    assert read_own(write(tmp_path / "b.npz", rows(next_observations=arrived))).loose_ends() == 0
    unmarked = rows(next_observations=arrived, timeouts=np.zeros(ROWS))
    assert read_own(write(tmp_path / "c.npz", unmarked)).loose_ends() == 1


def test_rows_with_next_observations_are_all_kept(tmp_path):
    time = np.arange(ROWS)
    arrays = rows(next_observations=np.stack([time + 100, time], axis=1), physics=None)
    arrays |= {"terminations": arrays.pop("terminals"), "truncations": arrays.pop("timeouts")}
    data = read_own(write(tmp_path / "a.npz", arrays)).data
    assert columns(data) == {
        "row": list(range(8)),
        "arrived": list(range(100, 108)),
        "reward": [step + 0.25 for step in range(8)],
        "terminated": [4],
        "truncated": [2, 7],
        "episode": [0, 0, 0, 1, 1, 2, 2, 2],
    }
    assert "left_out" not in data.keys()  # noqa: SIM118 - not a mapping


def test_a_file_of_an_episode_may_have_its_last_observation_too(tmp_path):
    physics = np.arange(5)[:, None] + 1e-12
    arrays = rows(4, terminals=np.zeros((4, 1)), timeouts=None, rewards=np.ones((4, 1)), physics=physics)
    arrays["observations"] = np.arange(10).reshape(5, 2)
    data = read_own(write(tmp_path / "a.npz", arrays)).data
    assert columns(data)["arrived"] == [2, 4, 6, 8]
    assert columns(data)["truncated"] == [3]
    assert torch.equal(data["next", "physics"][:, 0], torch.arange(1, 5).double() + 1e-12)


def test_physics_arrive_as_observations_do(tmp_path):
    time = np.arange(ROWS)[:, None]
    follow = read_own(write(tmp_path / "a.npz", rows(physics=time + 1e-12))).data["next", "physics"][:, 0]
    assert (follow - 1e-12).tolist() == [1, 2, 4, 4, 6, 7]
    told = rows(next_observations=np.zeros((ROWS, 2)), physics=time, next_physics=time + 50)
    assert read_own(write(tmp_path / "b.npz", told)).data["next", "physics"][:, 0].tolist() == list(range(50, 58))


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path):
    for number, name in enumerate(("b.npz", "a.hdf5")):
        write(tmp_path / name, rows(observations=np.full((ROWS, 2), number)))
    for name in ("._a.npz", ".ipynb_checkpoints/a.npz", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("nothing")
    data = read_own(tmp_path).data
    assert data["observation"][:, 0].tolist() == [1] * 6 + [0] * 6
    assert data["source"].tolist() == [0] * 6 + [1] * 6
    assert data["episode"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [([-2, 2], [-0.9, 0.9]), ([[0], [2]], [0.8, 0.8]), ([[-2, 0], [2, 2]], [-0.9, 0.8]), (None, None)],
)
def test_actions_become_numbers_from_minus_one_to_one(bounds, expected, tmp_path):
    action = np.array([[-1.8, 1.8]]) if bounds and bounds[0] in (-2, [-2, 0]) else np.array([[1.8, 1.8]])
    path = write(tmp_path / "a.npz", rows(actions=np.repeat(action, ROWS, 0)))
    if expected is None:
        with pytest.raises(
            ValueError, match=r"expected actions from -1 to 1, found 1.8 to 1.8; their bounds are set as"
        ):
            read_own(path)
        return
    np.testing.assert_allclose(read_own(path, bounds).data["action"][0], expected, rtol=1e-6)


def write_minari(folder: Path, episodes: int = 12, **metadata: object) -> Path:
    """As Minari 0.5.4 writes a data set of Pendulum: rewards in double precision, all numbers in one file."""
    file = folder / "data" / "main_data.hdf5"
    arrays = {}
    for episode in range(episodes):
        steps = np.arange(3 + episode % 2)
        ended = steps == steps[-1]
        arrays |= {
            f"episode_{episode}/observations": np.arange(len(steps) + 1, dtype=np.float32)[:, None] + 10 * episode,
            f"episode_{episode}/actions": np.full((len(steps), 1), 2 - episode / 6, np.float32),
            f"episode_{episode}/rewards": steps + 0.5,
            f"episode_{episode}/terminations": ended & (episode % 2 == 1),
            f"episode_{episode}/truncations": ended & (episode % 2 == 0),
        }
    write(file, arrays)
    space = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-2.0], "high": [2.0]}
    metadata = {"total_episodes": episodes, "action_space": json.dumps(space), **metadata}
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    return file


@pytest.mark.parametrize("named", ["folder", "file"])
def test_minari_data_sets(named, tmp_path):
    file = write_minari(tmp_path)
    data = read_own(tmp_path if named == "folder" else file).data
    lengths = [3 + episode % 2 for episode in range(12)]
    assert data["episode"].bincount().tolist() == lengths
    assert data["observation"][:, 0].tolist() == [10 * e + t for e in range(12) for t in range(lengths[e])]
    assert torch.equal(data["next", "observation"], data["observation"] + 1)
    ends = np.cumsum(lengths) - 1
    assert data["next", "terminated"][:, 0].nonzero().flatten().tolist() == ends[1::2].tolist()
    assert data["next", "truncated"][:, 0].nonzero().flatten().tolist() == ends[::2].tolist()
    torch.testing.assert_close(data["action"][ends, 0], 1 - torch.arange(12) / 12)


def test_what_is_wrong_with_a_minari_data_set_is_one_sentence(tmp_path):
    file = write_minari(tmp_path, total_episodes=13)
    with pytest.raises(ValueError, match=r"main_data.hdf5: expected 13 episodes, as metadata.json says, found 12"):
        read_own(file)
    for metadata, message in (
        (b"{}", "metadata.json: expected Minari's metadata, found something else"),
        (b"\xff", "metadata.json: expected text in UTF-8, found something else"),
        (b'{"total_episodes": 12}', "metadata.json: expected a Box as action_space, found another"),
        (b'{"total_episodes": 12, "action_space": "{\\"type\\": \\"Discrete\\"}"}', "its type is Discrete"),
    ):
        file.with_name("metadata.json").write_bytes(metadata)
        with pytest.raises(ValueError, match=message):
            read_own(file)
    write_minari(tmp_path)
    with h5py.File(file, "a") as h5:
        h5["episode_3/terminations"][1] = True
    with pytest.raises(
        ValueError, match=r"expected a single episode, as episode_3/observations has a row more than act"
    ):
        read_own(file)
    with h5py.File(file, "a") as h5:
        del h5["episode_2/observations"]
        h5["episode_2/observations/goal"] = np.zeros((4, 2))
    with pytest.raises(
        ValueError, match="expected episode_2/observations to be one array, found a dictionary of several"
    ):
        read_own(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "expected the array 'rewards', found only actions, observations, terminals, timeouts"),
        (
            {"terminals": None},
            r"expected the array 'terminals' \(or 'terminations'\), 1 where an episode ended for good, beside "
            r"'timeouts' \(or 'truncations'\), 1 where it was cut off; found only actions, "
            "observations, rewards, timeouts",
        ),
        ({"actions": np.zeros((7, 3))}, "expected 7 rows in rewards, found 8; actions have 7"),
        (
            {"actions": np.zeros(8)},
            r"expected actions to be numbers .rows, width., none of them 0, found float64 \[8\]",
        ),
        (
            {"actions": np.zeros((8, 0))},
            r"expected actions to be numbers .rows, width., none of them 0, found float64 \[8, 0\]",
        ),
        (
            {"actions": np.full((8, 2), "left")},
            "expected actions to be numbers .rows, width., none of them 0, found <U4",
        ),
        ({"rewards": np.zeros((8, 2))}, r"expected one number in a row of rewards, found \[8, 2\]"),
        ({"rewards": np.full(8, 1e39)}, r"expected numbers of at most 3.4e\+38 in rewards, found 1e\+39"),
        ({"rewards": np.full(8, -np.inf)}, "expected finite numbers in rewards, found -inf in row 0"),
        ({"terminals": np.full(8, 0.5)}, "expected only 0 and 1 in terminals, found 0.5"),
        ({"timeouts": np.full(8, np.nan)}, "expected only 0 and 1 in timeouts, found nan"),
        ({"timeouts": None, "terminals": np.zeros(8)}, r"expected the array 'timeouts' \(or 'truncations'\), all 0"),
        ({"terminals": np.zeros(8), "timeouts": np.ones(8)}, "expected at least one transition, found none in 8 rows"),
        ({"next_observations": np.zeros((8, 3))}, "expected next_observations of size 2, found 3"),
        (
            {"next_observations": np.zeros((8, 2)), "physics": np.zeros((8, 2))},
            "expected next_physics beside physics and next_observations, found none",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(change, message, tmp_path):
    path = write(tmp_path / "mine.npz", rows(**change))
    with pytest.raises(ValueError, match=f"mine.npz: {message}"):
        read_own(path)


def test_what_is_wrong_with_a_path_or_bounds_is_one_sentence(tmp_path):
    path = write(tmp_path / "mine.npz", rows())
    for bounds in ([-2], [2, -2], [[-2, 2], [2, 2]], [-np.inf, 2], "ab"):
        with pytest.raises(
            ValueError, match=r"^action_range=.*: expected two numbers or two lists, the lower first\.$"
        ):
            read_own(path, bounds)
    with pytest.raises(ValueError, match=r"mine.npz: expected two numbers or two lists of \d as action_range, found"):
        read_own(path, [[-2] * 7, [2] * 7])
    with pytest.raises(ValueError, match=r"mine.csv: expected a file of one of .npz, .hdf5, .h5, or a folder of such"):
        read_own(tmp_path / "mine.csv")
    with pytest.raises(FileNotFoundError, match=r"none.npz: expected an .npz file, found none"):
        read_own(tmp_path / "none.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected files of one of .npz, .hdf5, .h5 in this folder"):
        read_own(tmp_path / "empty")
    write(tmp_path / "two" / "a.npz", rows())
    write(tmp_path / "two" / "b.npz", rows(observations=np.zeros((ROWS, 5))))
    with pytest.raises(
        ValueError, match=r"b.npz: expected observation of width \[2\], as in what was read before, found"
    ):
        read_own(tmp_path / "two")


def test_of_a_group_that_lacks_an_array_it_is_said_what_there_is(tmp_path):
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        for name in ("observations", "actions", "terminations", "truncations"):
            file[f"episode_0/{name}"] = np.zeros((3, 1) if name in ("observations", "actions") else 3)
    expected = r"expected the array 'episode_0/rewards', found only actions, observations, terminations, truncations\.$"
    with pytest.raises(ValueError, match=expected):
        read_own(tmp_path / "main_data.hdf5")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_the_row_of_a_number_that_is_not_finite_is_named(value, tmp_path):
    changed = rows()
    changed["observations"] = changed["observations"].astype(float)
    changed["observations"][5, 0] = value
    with pytest.raises(ValueError, match=rf"expected finite numbers in observations, found {value} in row 5\.$"):
        read_own(write(tmp_path / "mine.npz", changed))
