import pytest
import torch
from tensordict import TensorDict

from datamodules.replay import ReplayBuffer

ENVS = 3
EXAMPLE = TensorDict(
    {
        "observation": torch.zeros(ENVS, 1),
        "next": {
            "observation": torch.zeros(ENVS, 1),
            "reward": torch.zeros(ENVS, 1),
            "terminated": torch.zeros(ENVS, 1, dtype=torch.bool),
            "truncated": torch.zeros(ENVS, 1, dtype=torch.bool),
        },
    },
    [ENVS],
)


def steps(first: int, count: int, ends: dict[int, str] | None = None) -> TensorDict:
    """Steps whose observation is 10 x time + row and whose reward is that of the arrival; `ends` says when and how."""
    time = torch.arange(first, first + count).float()
    observation = (10 * time + torch.arange(ENVS)[:, None])[..., None]
    flags = {
        name: torch.tensor([(ends or {}).get(first + t) == name for t in range(count)]).expand(ENVS, count)[..., None]
        for name in ("terminated", "truncated")
    }
    following = {"observation": observation + 10, "reward": observation / 10, **flags}
    return TensorDict({"observation": observation, "next": following, "extra": observation}, [ENVS, count])


def draw(buffer: ReplayBuffer, count: int = 2000, **settings) -> TensorDict:
    return buffer.sample((count,), torch.Generator().manual_seed(0), **settings)


@pytest.fixture(params=["memory", "memmap"])
def storage(request) -> str:
    return request.param


def test_window_slides_over_the_last_steps_of_every_environment(tmp_path, storage):
    buffer = ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage=storage)
    for first, count in ((0, 3), (3, 1), (4, 30)):
        buffer.extend(steps(first, count))
        last = first + count
        seen = draw(buffer)["observation"].flatten()
        expected = {10 * t + e for t in range(max(0, last - 10), last) for e in range(ENVS)}
        assert set(seen.int().tolist()) == expected
    assert "extra" not in draw(buffer)
    torch.testing.assert_close(draw(buffer)["next", "observation"], draw(buffer)["observation"] + 10)


def test_sampling_is_uniform(tmp_path):
    buffer = ReplayBuffer(EXAMPLE, 3 * 4, margin=2, folder=tmp_path)
    buffer.extend(steps(0, 9))
    counts = draw(buffer, 60_000)["observation"].flatten().unique(return_counts=True)[1]
    assert len(counts) == 12
    assert (counts / 60_000 - 1 / 12).abs().max() < 0.005


@pytest.mark.parametrize("n_step", [1, 2, 3, 5])
def test_n_step_returns_are_those_of_brute_force(tmp_path, storage, n_step):
    buffer = ReplayBuffer(EXAMPLE, 3 * 12, margin=3, folder=tmp_path, storage=storage)
    ends = {14: "terminated", 20: "truncated", 21: "truncated"}
    buffer.extend(steps(0, 25, ends))
    batch = draw(buffer, n_step=n_step, discount=0.5)
    starts = set()
    for i in range(len(batch)):
        start, row = divmod(int(batch["observation"][i]), 10)
        starts.add(start)
        reward, t = 0.0, start
        for k in range(n_step):
            t = start + k
            reward += 0.5**k * (10 * t + row) / 10
            if t in ends:
                break
        assert batch["next", "reward"][i].item() == pytest.approx(reward)
        assert batch["next", "observation"][i].item() == 10 * (t + 1) + row
        assert batch["next", "terminated"][i].item() == (ends.get(t) == "terminated")
        if n_step > 1:
            assert batch["steps_to_next_obs"][i].item() == t - start + 1
    assert starts == set(range(13, 25 - n_step + 1))  # no window reaches beyond what is collected


@pytest.mark.parametrize("after", [1, 4])
def test_what_is_written_after_a_commit_leaves_it_untouched(tmp_path, storage, after):
    buffer = ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage=storage)
    buffer.extend(steps(0, 37))
    written = buffer.commit()
    assert (written > 0) == (storage == "memory")
    assert buffer.commit() == 0  # nothing new
    expected = draw(buffer)
    buffer.extend(steps(37, after))
    if after == 4:
        assert (
            0 <= buffer.commit() <= 4 * ENVS * 14
        )  # only what is new; the checkpoint that belongs to it was not taken

    restored = ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage=storage)
    restored.restore(37)
    assert (draw(restored) == expected).all()
    restored.extend(steps(37, 20))
    buffer.extend(steps(37 + after, 20 - after))
    assert (draw(restored) == draw(buffer)).all()


def test_overwritten_window_is_refused(tmp_path):
    buffer = ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage="memmap")
    buffer.extend(steps(0, 37))
    buffer.commit()
    buffer.extend(steps(37, 5))
    with pytest.raises(ValueError, match=r"expected the last 10 of 37 steps, found some overwritten"):
        ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path).restore(37)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the replay data of the checkpoint, found none"):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path).restore(5)
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path)
    buffer.extend(steps(0, 5))
    buffer.commit()
    with pytest.raises(ValueError, match=r"expected .* to be \[24, 3, 1\] of .*, found \[14, 3, 1\] of"):
        ReplayBuffer(EXAMPLE, 60, 4, tmp_path).restore(5)


def test_settings_that_make_no_sense_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown storage='disk': expected one of memory, memmap"):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path, storage="disk")
    with pytest.raises(ValueError, match="capacity=2: expected at least one transition for each of 3"):
        ReplayBuffer(EXAMPLE, 2, 4, tmp_path)
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path)
    buffer.extend(steps(0, 2))
    with pytest.raises(ValueError, match="n_step=3: expected as many steps in the replay data, found 2"):
        draw(buffer, n_step=3)


def test_episodes_that_will_not_go_on_end_with_the_newest_step(tmp_path, storage):
    buffer = ReplayBuffer(EXAMPLE, 3 * 12, margin=3, folder=tmp_path, storage=storage)
    buffer.extend(steps(0, 5))
    buffer.commit()
    resumed = ReplayBuffer(EXAMPLE, 3 * 12, margin=3, folder=tmp_path, storage=storage)
    resumed.restore(5)
    resumed.end_episodes()
    resumed.extend(steps(100, 5))
    batch = draw(resumed, n_step=3, discount=1.0)
    for start, end, count in zip(
        batch["observation"].flatten() // 10, batch["next", "observation"].flatten() // 10, batch["steps_to_next_obs"]
    ):
        assert (end > 100) == (start >= 100)
        assert count == min(3, (5 if start < 100 else 105) - start)
