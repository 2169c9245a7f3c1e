import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tensordict import NonTensorData, TensorDict

from datamodules.replay import ReplayBuffer, delete_replay_files

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
    # No window reaches beyond what is collected, or beyond the end of an episode that did not terminate.
    cut = {20 - k for k in range(n_step - 1)} | {21 - k for k in range(n_step - 1)}
    cut -= {t for t in range(15) if t + n_step > 14}  # a termination before that ends the return
    assert starts == set(range(13, 25 - n_step + 1)) - cut


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


@pytest.mark.parametrize("name", ["steps/observation.memmap", "steps/next/reward.memmap", "numbers/step.memmap"])
def test_files_that_were_cut_short_are_refused_and_left_alone(tmp_path, storage, name):
    buffer = ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage=storage)
    buffer.extend(steps(0, 5))
    buffer.commit()
    file = tmp_path / name
    whole = file.read_bytes()
    for size in (0, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{name}: expected {len(whole)} bytes of replay data, found {size}"):
            ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage=storage).restore(5)
        assert file.stat().st_size == size
    file.write_bytes(whole)
    ReplayBuffer(EXAMPLE, 3 * 10, margin=4, folder=tmp_path, storage=storage).restore(5)


@pytest.mark.parametrize("name", ["steps/meta.json", "steps/next/meta.json", "numbers/meta.json"])
@pytest.mark.parametrize("text", [None, '{"observation": ', "[]", '{"observation": {}, "reward": {}, "step": {}}'])
def test_a_damaged_description_is_named(tmp_path, name, text):
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path)
    buffer.extend(steps(0, 5))
    buffer.commit()
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: expected a description of \w+, found none that is whole"):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path).restore(5)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the replay data of the checkpoint, found none"):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path).restore(5)
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path)
    buffer.extend(steps(0, 5))
    buffer.commit()
    with pytest.raises(ValueError, match=r"expected torch.float32 \[24, 3, 1\], found torch.float32 \[14, 3, 1\]\."):
        ReplayBuffer(EXAMPLE, 60, 4, tmp_path).restore(5)


class Calls:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_a_folder_says_of_itself_is_not_made(tmp_path, storage):
    """`TensorDict.load_memmap` makes an entry that is no tensor by unpickling a file beside it."""
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path / "replay", storage=storage)
    buffer.extend(steps(0, 5))
    buffer.commit()
    TensorDict({"extra": NonTensorData(Calls(tmp_path / "called"))}).memmap(tmp_path / "more")
    shutil.copytree(tmp_path / "more" / "extra", tmp_path / "replay" / "steps" / "extra")
    said = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("more", "replay/steps")]
    (tmp_path / "replay" / "steps" / "meta.json").write_text(json.dumps({**said[0], **said[1]}))
    restored = ReplayBuffer(EXAMPLE, 30, 4, tmp_path / "replay", storage=storage)
    restored.restore(5)
    assert not (tmp_path / "called").exists()
    assert (draw(restored) == draw(buffer)).all()


@pytest.mark.parametrize("name", ["steps/observation.memmap", "steps/next", "numbers"])
def test_links_are_refused_for_they_would_be_written_to(tmp_path, name):
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path / "replay", storage="memmap")
    buffer.extend(steps(0, 5))
    buffer.commit()
    path = tmp_path / "replay" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name}: expected replay data, found a link\."):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path / "replay", storage="memmap").restore(5)
    linked = tmp_path / "elsewhere"
    before = {file: file.read_bytes() for file in (linked, *linked.rglob("*")) if file.is_file()}
    anew = ReplayBuffer(EXAMPLE, 30, 4, tmp_path / "replay", storage="memmap")
    anew.extend(steps(7, 5))
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("name", ["steps/meta.json", "steps/observation.memmap"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_named(tmp_path, name, make):
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path)
    buffer.extend(steps(0, 5))
    buffer.commit()
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: expected .*, found (none|0|a link)"):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path).restore(5)


def test_only_the_files_of_replay_buffers_are_deleted(tmp_path):
    for process in range(2):
        buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path / "replay" / f"process_{process}")
        buffer.extend(steps(0, 5))
        buffer.commit()
    kept = [tmp_path / "replay" / name for name in ("notes.txt", "process_1/steps/notes.txt", "process_x/meta.json")]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    delete_replay_files(tmp_path / "replay")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert not (tmp_path / "replay" / "process_0").exists()
    for path in kept:
        path.unlink()
    (tmp_path / "replay" / "process_x").rmdir()
    delete_replay_files(tmp_path / "replay")
    assert not list(tmp_path.iterdir())


def test_settings_that_make_no_sense_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown storage='disk': expected one of memory, memmap"):
        ReplayBuffer(EXAMPLE, 30, 4, tmp_path, storage="disk")
    with pytest.raises(ValueError, match=r"datamodule.replay_capacity=2: expected at least 3, one for each"):
        ReplayBuffer(EXAMPLE, 2, 4, tmp_path)
    with pytest.raises(
        ValueError, match=r"^datamodule.replay_capacity.*: expected at most the [\d.]+ GB of memory, found [\d.]+ TB"
    ):
        ReplayBuffer(EXAMPLE, 2**40, 4, tmp_path)
    buffer = ReplayBuffer(EXAMPLE, 30, 4, tmp_path)
    buffer.extend(steps(0, 2))
    with pytest.raises(ValueError, match="n_step=3: expected as many steps of an episode in the replay data, found 2"):
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
        assert count == 3
        assert start in (0, 1, 2, 100, 101, 102)


# -- pictures -----------------------------------------------------------------------------------------------------


def film(count: int, lengths: tuple[int, ...] = (7, 40), stack: int = 3) -> TensorDict:
    """Steps [N, T] of N environments whose episodes have these lengths; every picture is another."""
    shown, rows = 0, []

    def picture() -> torch.Tensor:
        nonlocal shown
        shown += 1
        return torch.tensor([shown // 256, shown % 256], dtype=torch.uint8).view(2, 1, 1).expand(2, 4, 4)

    for length in lengths:
        steps, age, frames = [], 0, []
        for t in range(count):
            frames = [picture()] * stack if age == 0 else frames
            following = [*frames[1:], picture()]
            age = (age + 1) % length
            steps.append((torch.cat(frames), torch.cat(following), age == 0, float(t)))
            frames = following
        rows.append(steps)
    observation, following = (torch.stack([torch.stack([step[i] for step in row]) for row in rows]) for i in (0, 1))
    truncated, reward = (torch.tensor([[step[i] for step in row] for row in rows])[..., None] for i in (2, 3))
    flags = {"terminated": torch.zeros_like(truncated), "truncated": truncated}
    return TensorDict(
        {"observation": observation, "next": {"observation": following, "reward": reward, **flags}}, truncated.shape[:2]
    )


def film_buffer(folder, steps: TensorDict, capacity: int, stack: int | None = 3, **settings) -> ReplayBuffer:
    return ReplayBuffer(steps[:, 0], capacity, 4, folder, frame_stack=stack, **settings)


@pytest.mark.parametrize("n_step", [1, 3])
def test_stacks_of_pictures_come_back_as_they_were(tmp_path, storage, n_step):
    steps = film(100, lengths=(33, 40))
    single = film_buffer(tmp_path / "single", steps, 2 * 50, storage=storage)
    whole = film_buffer(tmp_path / "whole", steps, 2 * 50, stack=None, storage=storage)
    for buffer in (single, whole):
        for part in steps.split(9, 1):
            buffer.extend(part)
    assert single.size == 50
    found, expected = (draw(buffer, n_step=n_step, discount=0.9) for buffer in (single, whole))
    assert (found == expected).all()
    assert found["observation"].dtype == torch.uint8


def test_every_picture_is_stored_once(tmp_path):
    steps = film(64)
    buffer = film_buffer(tmp_path, steps, 2 * 64)
    buffer.extend(steps)
    pictures = {tuple(picture.flatten().tolist()) for picture in steps["observation"].flatten(0, 1).split(2, 1)[0]}
    pictures |= {tuple(picture.flatten().tolist()) for picture in steps["next", "observation"].flatten(0, 1)[:, -2:]}
    assert buffer._frames.written == len(pictures) == 2 * 64 + 10 + 2
    assert buffer._frames.length < 1.1 * 2 * 64 + 2 * 4 * 2 + 3 * 2


def test_many_short_episodes_take_the_place_of_the_oldest_steps(tmp_path):
    steps = film(200, lengths=(2, 2))
    buffer = film_buffer(tmp_path, steps, 2 * 50)
    buffer.extend(steps)
    assert 20 < buffer.size < 50
    batch = draw(buffer)
    assert batch["next", "reward"].min() == 200 - buffer.size
    expected = {tuple(stack.flatten().tolist()) for stack in steps["observation"][:, 200 - buffer.size :].flatten(0, 1)}
    assert {tuple(stack.flatten().tolist()) for stack in batch["observation"]} == expected


@pytest.mark.parametrize("lengths", [(7, 40), (2, 3)])
@pytest.mark.parametrize("written", [3, 20, 97])
def test_pictures_of_a_commit_survive_what_is_written_after_it(tmp_path, storage, lengths, written):
    steps = film(140, lengths)
    buffer = film_buffer(tmp_path, steps, 2 * 30, storage=storage)
    buffer.extend(steps[:, :written])
    buffer.commit()
    expected, size = draw(buffer), buffer.size
    buffer.extend(steps[:, written : written + 4])
    restored = film_buffer(tmp_path, steps, 2 * 30, storage=storage)
    restored.restore(written)
    assert restored.size == size
    assert (draw(restored) == expected).all()
    restored.extend(steps[:, written : written + 40])
    buffer.extend(steps[:, written + 4 : written + 40])
    assert (draw(restored) == draw(buffer)).all()


def test_returns_of_a_short_episode(tmp_path):
    """Six steps with rewards 1 to 6: only starts whose three steps the episode has, of the published sampler."""
    steps = film(12, lengths=(6,))
    steps["next", "reward"] += 1
    buffer = film_buffer(tmp_path, steps, 12)
    buffer.extend(steps[:, :6])
    batch = draw(buffer, n_step=3, discount=0.99)
    returns = {round(value, 4) for value in batch["next", "reward"].flatten().tolist()}
    assert returns == {round(k + 0.99 * (k + 1) + 0.9801 * (k + 2), 4) for k in (1, 2, 3, 4)}
    assert 5.9203 in returns
    assert (batch["steps_to_next_obs"] == 3).all()  # a discount of 0.970299
    first = batch["observation"][batch["next", "reward"].flatten() < 6]
    for stack in first:
        assert torch.equal(stack[:2], stack[2:4])
        assert torch.equal(stack[:2], stack[4:])


def test_a_full_disk_is_said_before_anything_is_written(small_disk, storage):
    folder = small_disk / "replay"
    buffer = ReplayBuffer(EXAMPLE, 3 * 300_000, margin=4, folder=folder, storage=storage)

    def write() -> None:
        buffer.extend(steps(0, 5))
        buffer.commit()

    with pytest.raises(ValueError, match=rf"^{folder}: expected \d{{8}} bytes of free space .*, found 83\d{{5}}\.$"):
        write()
    assert not list(small_disk.iterdir())


def test_files_have_their_room_also_when_they_were_copied(tmp_path, storage):
    buffer = ReplayBuffer(EXAMPLE, 3 * 5000, margin=4, folder=tmp_path / "first", storage=storage)
    buffer.extend(steps(0, 5))
    buffer.commit()
    subprocess.run(["cp", "--recursive", "--sparse=always", tmp_path / "first", tmp_path / "copy"], check=True)
    ReplayBuffer(EXAMPLE, 3 * 5000, margin=4, folder=tmp_path / "copy", storage=storage).restore(5)
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        found = file.stat()
        assert 512 * found.st_blocks >= found.st_size, file
