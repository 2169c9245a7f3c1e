import h5py
import numpy as np
import pytest
import torch

from datamodules.stored.readers import read_d4rl, read_exorl, read_mood, read_ogbench

STEPS = 5
DUMMY = 1e6  # in every slot that no transition may use


def episode(index: int, steps: int = STEPS, reward_columns: int = 1) -> dict[str, np.ndarray]:
    """Numbers that say where they come from: observation 100 e + t, action and reward of t stand at index t + 1."""
    time = np.arange(steps + 1)
    action = np.stack([100 * index + time - 1, -time], axis=1) + 0.5
    reward = np.repeat((100 * index + time - 1)[:, None] + 0.25, reward_columns, axis=1)
    action[0], reward[0] = DUMMY, DUMMY
    return {
        "observation": np.stack([100 * index + time, time, 0 * time], axis=1).astype(np.float32),
        "action": action.astype(np.float32),
        "reward": reward.astype(np.float32),
        "discount": np.ones((steps + 1, 1), np.float32),
        "physics": (100 * index + time)[:, None] + 1e-12,
    }


def assert_aligned(dataset, episodes: int, steps: int = STEPS) -> None:
    assert len(dataset) == episodes * steps
    data = dataset.data
    index = torch.arange(episodes).repeat_interleave(steps)
    time = torch.arange(steps).repeat(episodes)
    assert torch.equal(data["episode"], index)
    assert torch.equal(data["observation"][:, 0], (100 * index + time).float())
    assert torch.equal(data["next", "observation"][:, 0], (100 * index + time + 1).float())
    assert torch.equal(data["action"][:, 0], 100 * index + time + 0.5)
    assert torch.equal(data["next", "reward"][:, 0], 100 * index + time + 0.25)
    # the arrival's physics, in double precision
    assert torch.equal(data["next", "physics"][:, 0], (100 * index + time + 1).double() + 1e-12)
    assert torch.equal(data["next", "truncated"][:, 0], time == steps - 1)
    assert not data["next", "terminated"].any()
    assert torch.equal(data["next", "done"], data["next", "truncated"])
    assert all(value.abs().max() < DUMMY for _, value in data.items(True, True) if value.is_floating_point())


def test_hidden_files_are_no_episodes(tmp_path):
    write_exorl(tmp_path / "buffer")
    (tmp_path / "buffer" / "._episode_000000_5.npz").write_bytes(b"a Mac's")
    assert_aligned(read_exorl(tmp_path / "buffer", "toy"), episodes=3)


def write_exorl(folder, count: int = 3, **changes: np.ndarray) -> None:
    folder.mkdir()
    for index in reversed(range(count)):  # written in another order than they are to be read in
        np.savez_compressed(folder / f"episode_{index:06d}_{STEPS}.npz", **{**episode(index), **changes})


def test_exorl_alignment(tmp_path):
    write_exorl(tmp_path / "buffer")
    dataset = read_exorl(tmp_path / "buffer", "toy")
    assert_aligned(dataset, episodes=3)
    assert dataset.data["next", "reward"].shape == (15, 1)
    assert dataset.manifest["made_by"] == "exorl"
    dataset.save(tmp_path / "saved")
    assert_aligned(type(dataset).load(tmp_path / "saved", "toy"), episodes=3)


def test_exorl_reads_the_first_files_in_sorted_order(tmp_path):
    write_exorl(tmp_path / "buffer")
    assert_aligned(read_exorl(tmp_path / "buffer", "toy", max_episodes=2), episodes=2)


def test_exorl_episodes_of_other_lengths_and_termination(tmp_path):
    (tmp_path / "buffer").mkdir()
    short = episode(1, steps=2)
    short["discount"][-1] = 0
    np.savez(tmp_path / "buffer" / "a.npz", **episode(0))
    np.savez(tmp_path / "buffer" / "b.npz", **short)
    data = read_exorl(tmp_path / "buffer", "toy").data
    assert data["episode"].tolist() == [0] * 5 + [1] * 2
    assert data["next", "terminated"][:, 0].tolist() == [False] * 6 + [True]
    assert data["next", "truncated"][:, 0].tolist() == [False] * 4 + [True] + [False] * 2


def test_exorl_keeps_all_reward_columns_and_needs_no_physics(tmp_path):
    (tmp_path / "buffer").mkdir()
    arrays = episode(0, reward_columns=4)
    del arrays["physics"]
    np.savez(tmp_path / "buffer" / "a.npz", **arrays)
    data = read_exorl(tmp_path / "buffer", "toy").data
    assert data["next", "reward"].shape == (5, 4)
    assert ("next", "physics") not in data.keys(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros((STEPS, 2))}, "expected action of 6 rows and width 2, found shape"),
        ({"action": np.zeros((STEPS + 1, 3))}, "expected action of 6 rows and width 2, found shape"),
        ({"observation": np.zeros((STEPS + 1, 9))}, "expected observation of 6 rows and width 3"),
        ({"reward": np.full((STEPS + 1, 1), np.nan)}, "expected finite numbers in reward, found nan"),
        ({"observation": np.full((STEPS + 1, 3), np.inf)}, "expected finite numbers in observation"),
        ({"observation": np.full((STEPS + 1, 3), 1e39)}, r"expected numbers of at most 3.4e\+38 in observation"),
        (
            {"observation": np.zeros((STEPS + 1, 0))},
            r"expected observation to be numbers .rows, width., none of them 0, found float64",
        ),
        (
            {"action": np.zeros(STEPS + 1, [("x", float)])},
            "expected action to be numbers .rows, width., none of them 0, found",
        ),
        ({"discount": np.full((STEPS + 1, 1), 0.5)}, "expected discounts of 0 or 1"),
        (
            {"action": np.array([None] * 6)},
            r"expected action to be numbers .rows, width., none of them 0, found object \[6\]",
        ),
        (
            {"reward": np.array([None] * 6)},
            "expected reward to be numbers .rows. or .rows, width., none of them 0, found object",
        ),
        ({"discount": None}, "expected the array 'discount'"),
    ],
)
def test_exorl_errors_name_the_file(tmp_path, change, message):
    write_exorl(tmp_path / "buffer")
    bad = {key: value for key, value in {**episode(1), **change}.items() if value is not None}
    np.savez(tmp_path / "buffer" / f"episode_000001_{STEPS}.npz", **bad)
    with pytest.raises(ValueError, match=message) as error:
        read_exorl(tmp_path / "buffer", "toy")
    assert "episode_000001" in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_exorl_truncated_file(tmp_path, share):
    write_exorl(tmp_path / "buffer")
    path = tmp_path / "buffer" / f"episode_000002_{STEPS}.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"000002_5.npz: expected a complete .npz file"):
        read_exorl(tmp_path / "buffer", "toy")


def test_exorl_corrupt_file(tmp_path):
    write_exorl(tmp_path / "buffer")
    path = tmp_path / "buffer" / f"episode_000002_{STEPS}.npz"
    content = bytearray(path.read_bytes())
    content[120:130] = bytes(10)  # inside the compressed observations
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"000002_5.npz: expected a complete .npz file"):
        read_exorl(tmp_path / "buffer", "toy")


def test_exorl_missing_folder_and_wrong_domain(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder of ExORL episodes"):
        read_exorl(tmp_path / "nowhere", "toy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: expected a folder of ExORL episodes"):
        read_exorl(tmp_path / "empty", "toy")
    write_exorl(tmp_path / "buffer")
    with pytest.raises(ValueError, match="observations of size 67 and actions of size 21 for humanoid, found 3 and 2"):
        read_exorl(tmp_path / "buffer", "humanoid")


def write_mood(path, count: int = 70, **changes: np.ndarray | None) -> None:
    episodes = [episode(index) for index in range(count)]
    arrays = {key: np.stack([arrays[key] for arrays in episodes]) for key in ("observation", "action", "physics")}
    arrays["reward"] = np.stack([arrays["reward"][:, 0] for arrays in episodes])
    arrays["terminated"] = np.zeros((count, STEPS + 1), bool)
    arrays["terminated"][:, 0] = True  # a dummy, too
    with h5py.File(path, "w") as file:
        for key, value in {**arrays, **changes}.items():
            if value is not None:
                file[key] = value


def test_mood_alignment(tmp_path):
    write_mood(tmp_path / "mixed_task_rnd_sub__toy_walk_backward.hdf5")
    dataset = read_mood(tmp_path / "mixed_task_rnd_sub__toy_walk_backward.hdf5")
    assert_aligned(dataset, episodes=70)  # more than one block
    wanted = {"domain": "toy", "task": "walk_backward", "mixture": "mixed_task_rnd_sub"}
    assert dataset.manifest.items() >= wanted.items()
    assert not dataset.data["source"].any()


def test_mood_source_and_termination(tmp_path):
    terminated = np.zeros((4, STEPS + 1), bool)
    terminated[2, STEPS] = True
    write_mood(tmp_path / "a__toy_run.hdf5", count=4, source=np.array([3, 1, 4, 1]), terminated=terminated)
    data = read_mood(tmp_path / "a__toy_run.hdf5").data
    assert data["source"].tolist() == [3] * 5 + [1] * 5 + [4] * 5 + [1] * 5
    assert data["next", "terminated"][:, 0].nonzero().flatten().tolist() == [14]
    assert data["next", "truncated"][:, 0].nonzero().flatten().tolist() == [4, 9, 19]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "expected the array 'reward', found only"),
        ({"reward": np.zeros((2, STEPS))}, r"expected reward of shape \[3, 6, ...\], found \[2, 5\]"),
        ({"action": np.zeros((3, STEPS, 2))}, r"expected action of shape \[3, 6, ...\]"),
        ({"action": np.full((3, STEPS + 1, 2), np.nan)}, "expected finite numbers in action"),
        ({"observation": np.zeros((3, 4))}, "expected observation to be numbers .rows, width, depth."),
        ({"source": np.zeros(2)}, r"expected source of shape \[3\], found \[2\]"),
        ({"source": np.array([0, 0.5, 1])}, "expected whole numbers of 64 bits in source, found 0.5"),
        ({"source": np.array([0, np.nan, 1])}, "expected whole numbers of 64 bits in source, found nan"),
        ({"source": np.array([0, 2**63, 1], np.uint64)}, r"expected whole numbers of 64 bits in source, found 9.22"),
        ({"terminated": np.full((3, STEPS + 1), 2)}, "expected only 0 and 1 in terminated, found 2"),
        ({"action": np.full((3, STEPS + 1, 2), 1e39)}, r"expected numbers of at most 3.4e\+38 in action, found 1e\+39"),
    ],
)
def test_mood_errors_name_the_file(tmp_path, change, message):
    write_mood(tmp_path / "a__toy_run.hdf5", count=3, **change)
    with pytest.raises(ValueError, match=rf"a__toy_run.hdf5: {message}"):
        read_mood(tmp_path / "a__toy_run.hdf5")


def test_mood_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an HDF5 file, found none"):
        read_mood(tmp_path / "a__toy_run.hdf5")
    with pytest.raises(ValueError, match=r"expected a name of the form MIXTURE__DOMAIN_TASK.hdf5, found 'data.hdf5'"):
        read_mood(tmp_path / "data.hdf5")
    write_mood(tmp_path / "a__point_mass_maze_reach_top_left.hdf5")
    with pytest.raises(ValueError, match="observations of size 4 and actions of size 2 for point_mass_maze, found 3"):
        read_mood(tmp_path / "a__point_mass_maze_reach_top_left.hdf5")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_hdf5(tmp_path, share):
    path = tmp_path / "a__toy_run.hdf5"
    write_mood(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a__toy_run.hdf5: expected a complete HDF5 file"):
        read_mood(path)


def write_d4rl(path, terminals, timeouts, next_observations=True, **changes: np.ndarray | None) -> None:
    n = len(terminals)
    time = np.arange(n)
    arrays = {
        "observations": np.stack([time, -time], axis=1).astype(np.float32),
        "actions": (time[:, None] + 0.5).astype(np.float32),
        "rewards": (time + 0.25).astype(np.float32),
        "terminals": np.asarray(terminals),
        "timeouts": None if timeouts is None else np.asarray(timeouts, bool),
        # true arrivals of terminal rows differ from the next row, which belongs to the next episode
        "next_observations": np.stack([time + 1000, -time], axis=1).astype(np.float32) if next_observations else None,
        "infos/qpos": time[:, None] + 1e-12,
        "infos/qvel": -time[:, None] - 1e-12,
    }
    with h5py.File(path, "w") as file:
        for key, value in {**arrays, **changes}.items():
            if value is not None:
                file[key] = value


def test_d4rl_transitions(tmp_path):
    #            rows 0 1 2 | 3 4 | 5 6 7 (the last row is always dropped)
    write_d4rl(tmp_path / "toy_x-v2.hdf5", [0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0])
    dataset = read_d4rl(tmp_path / "toy_x-v2.hdf5")
    data = dataset.data
    assert dataset.manifest["domain"] == "toy"
    assert data["observation"][:, 0].tolist() == [0, 1, 3, 4, 5, 6]  # row 2 has a timeout
    assert data["next", "observation"][:, 0].tolist() == [1, 2, 4, 1004, 6, 7]
    assert data["action"][:, 0].tolist() == [0.5, 1.5, 3.5, 4.5, 5.5, 6.5]
    assert data["next", "reward"][:, 0].tolist() == [0.25, 1.25, 3.25, 4.25, 5.25, 6.25]
    assert data["next", "terminated"][:, 0].tolist() == [False, False, False, True, False, False]
    assert data["next", "truncated"][:, 0].tolist() == [False, True, False, False, False, True]
    assert data["episode"].tolist() == [0, 0, 1, 1, 2, 2]
    # the rewards of what was dropped count in returns, if there is an episode to count them in
    assert data["left_out"][:, 0].nan_to_num(-1).tolist() == [-1, 2.25, -1, -1, -1, 7.25]
    physics = data["next", "physics"]
    assert physics.dtype == torch.float64
    assert physics[:, 0].isnan().tolist() == [False, False, False, True, False, False]  # not in the file
    assert physics[4].tolist() == [6 + 1e-12, -6 - 1e-12]


def test_d4rl_without_next_observations_takes_the_next_row(tmp_path):
    write_d4rl(tmp_path / "Ant_maze_x.hdf5", [0, 1, 0, 0], [0, 0, 0, 0], next_observations=False)
    with pytest.raises(ValueError, match="size 29 and actions of size 8 for antmaze, found 2 and 1"):
        read_d4rl(tmp_path / "Ant_maze_x.hdf5")
    (tmp_path / "Ant_maze_x.hdf5").rename(tmp_path / "toy.hdf5")
    data = read_d4rl(tmp_path / "toy.hdf5").data
    assert data["next", "observation"][:, 0].tolist() == [1, 2, 3]
    assert data["next", "physics"].isfinite().all()


def test_d4rl_without_timeouts_counts_1000_steps(tmp_path):
    terminals = np.zeros(3500, bool)
    terminals[[200, 2900]] = True
    write_d4rl(tmp_path / "toy.hdf5", terminals, None)
    data = read_d4rl(tmp_path / "toy.hdf5").data
    # D4RL's own loop, written down once more
    kept, step = [], 0
    for row in range(3499):
        if step == 999:
            step = 0
            continue
        step = 0 if terminals[row] else step + 1
        kept.append(row)
    assert data["observation"][:, 0].tolist() == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "expected the array 'rewards'"),
        ({"actions": np.zeros((3, 1))}, "expected 4 rows in actions, as in observations, found 3"),
        ({"rewards": np.full(4, np.nan)}, "expected finite numbers in rewards"),
        ({"terminals": [0, 0.5, 0, 0]}, "expected only 0 and 1 in terminals, found 0.5"),
        ({"infos/qpos": np.full((4, 1), np.inf)}, "expected finite numbers in infos/qpos"),
        ({"rewards": np.zeros((4, 1))}, "expected rewards to be numbers .rows."),
        ({"timeouts": [1] * 4}, "expected at least one transition, found none in 4 rows"),
    ],
)
def test_d4rl_errors_name_the_file(tmp_path, change, message):
    write_d4rl(tmp_path / "toy.hdf5", **{"terminals": [0] * 4, "timeouts": [0] * 4, **change})
    with pytest.raises(ValueError, match=f"toy.hdf5: {message}"):
        read_d4rl(tmp_path / "toy.hdf5")


# -- OGBench ------------------------------------------------------------------------------------------------------


def ogbench_file(path, **changes):
    """Two episodes, of four states and of three; the body walks along the first coordinate."""
    time = np.array([0, 1, 2, 3, 0, 1, 2], np.float32)
    arrays = {
        "observations": np.stack([time, 10 * time, np.arange(7)], 1),
        "actions": np.linspace(-1, 1, 14).reshape(7, 2).astype(np.float32),
        "terminals": np.array([0, 0, 0, 1, 0, 0, 1], np.float32),
        "qpos": np.stack([time, 0 * time], 1),
        "qvel": np.ones((7, 1)),
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_ogbench_rows_lead_to_the_next_state_and_last_ones_nowhere(tmp_path):
    data = read_ogbench(ogbench_file(tmp_path / "a.npz")).data
    assert data["observation"][:, 2].tolist() == [0, 1, 2, 4, 5]
    assert data["next", "observation"][:, 2].tolist() == [1, 2, 3, 5, 6]
    assert data["next", "physics"].tolist() == [[1, 0, 1], [2, 0, 1], [3, 0, 1], [1, 0, 1], [2, 0, 1]]
    assert data["action"][:, 0].tolist() == pytest.approx([-1, -1 + 4 / 13, -1 + 8 / 13, -1 + 16 / 13, -1 + 20 / 13])
    assert not data["next", "terminated"].any()
    assert data["next", "truncated"][:, 0].tolist() == [False, False, True, False, True]
    assert data["episode"].tolist() == [0, 0, 0, 1, 1]
    assert data["next", "reward"].eq(0).all()
    assert "left_out" not in data.keys()  # noqa: SIM118 - not a mapping


def test_ogbench_rewards_are_of_states_at_the_goal(tmp_path):
    data = read_ogbench(ogbench_file(tmp_path / "a.npz"), goal=[2, 0], tolerance=0.5).data
    assert data["next", "reward"][:, 0].tolist() == [-1, -1, 0, -1, -1]
    assert data["next", "terminated"][:, 0].tolist() == [False, False, True, False, False]
    assert data["next", "reward"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"^goal=\[\]: expected at least two numbers, found 0\.$"):
        read_ogbench(tmp_path / "a.npz", goal=[])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"terminals": None}, {}, "terminals"),
        ({"terminals": np.zeros(7)}, {}, "expected the last row to end an episode in terminals"),
        ({"actions": np.zeros((6, 2))}, {}, "expected 7 rows in actions, as in observations, found 6"),
        ({"qpos": None}, {"goal": [0, 0]}, "qpos"),
        ({}, {"goal": [0, 0], "first": 15}, "expected at least 17 numbers in qpos, found 2"),
        ({"observations": np.zeros((7, 4, 4, 3), np.uint8)}, {}, "observations"),
    ],
)
def test_ogbench_files_that_are_not_are_refused(changes, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_ogbench(ogbench_file(tmp_path / "a.npz", **changes), **settings)
    assert str(tmp_path / "a.npz") in str(error.value)
    assert "\n" not in str(error.value)
