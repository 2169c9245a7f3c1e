import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from datamodules.stored.collect import Shard, collect_dataset, dataset_folder
from datamodules.stored.transitions import TransitionDataset

ROWS, STEPS, SHARDS = 3, 8, 4
RECIPE = {"domain": "toy", "seed": 5, "shards": SHARDS, "noise": 0.1}


class Drift(EnvBase):
    """Rows drift by their action plus noise; a row terminates once its clock reaches its limit."""

    def __init__(self, limits: list[int]) -> None:
        super().__init__(batch_size=[len(limits)])
        n = len(limits)
        self.limits = torch.tensor(limits)
        self.observation_spec = Composite(
            observation=Unbounded((n, 2)), physics=Unbounded((n, 3), dtype=torch.float64), shape=(n,)
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, 2))
        self.reward_spec = Unbounded((n, 1))
        self.full_done_spec = Composite(
            **{key: Binary(1, (n, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")}, shape=(n,)
        )

    def _state(self) -> dict[str, torch.Tensor]:
        physics = torch.cat([self.position.double(), self.clock[:, None].double()], dim=1)
        return {"observation": self.position.clone(), "physics": physics}

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        everywhere = tensordict is None or "_reset" not in tensordict
        rows = torch.ones(self.batch_size, dtype=torch.bool) if everywhere else tensordict["_reset"].flatten()
        if everywhere:
            self.position, self.clock = torch.zeros(*self.batch_size, 2), torch.zeros(*self.batch_size)
        self.position[rows] = torch.randn(int(rows.sum()), 2, generator=self.generator)
        self.clock[rows] = 0
        return TensorDict(self._state(), batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        noise = 0.1 * torch.randn(*self.batch_size, 2, generator=self.generator)
        self.position = self.position + 0.1 * tensordict["action"] + noise
        self.clock = self.clock + 1
        terminated = (self.clock >= self.limits)[:, None]
        flags = {"terminated": terminated, "truncated": torch.zeros_like(terminated), "done": terminated.clone()}
        reward = self.position.sum(1, keepdim=True)
        return TensorDict({**self._state(), **flags, "reward": reward}, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self.generator = torch.Generator().manual_seed(seed)


def make_shard(number: int, seed: int, pause: float = 0.0, log: Path | None = None) -> Shard:
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{number}\n")

    def act(observation: torch.Tensor) -> torch.Tensor:
        time.sleep(pause)
        return torch.rand_like(observation) * 2 - 1  # from the global random state, on purpose

    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    return Shard(Drift([STEPS + 1, 3, STEPS + 1]), policy, STEPS, torch.tensor([number, 10, 20]))


def collect(root: Path, recipe: dict = RECIPE, pause: float = 0.0, log: Path | None = None) -> TransitionDataset:
    return collect_dataset(
        root, "toy", recipe, lambda number, seed: make_shard(number, seed, pause, log), expected_seconds=1
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a collection that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    collect(root)
    return dataset_folder(root, "toy", RECIPE)


def test_rows_become_episodes(whole):
    dataset = TransitionDataset.load(whole, "toy")
    data = dataset.data
    assert len(dataset) == SHARDS * ROWS * STEPS
    # rows 0 and 2 run through; row 1 terminates after 3 and 6 of 8 steps
    assert dataset.episode_lengths().tolist() == [8, 3, 3, 2, 8] * SHARDS
    ends = dataset.episode_lengths().cumsum(0) - 1
    assert data["next", "done"].flatten().nonzero().flatten().tolist() == ends.tolist()
    assert data["next", "terminated"][ends, 0].tolist() == [False, True, True, False, False] * SHARDS
    assert torch.equal(data["next", "truncated"], data["next", "done"] & ~data["next", "terminated"])
    # within an episode each arrival is the next departure, and only there
    same = (data["next", "observation"][:-1] == data["observation"][1:]).all(1)
    assert torch.equal(same, data["episode"][:-1] == data["episode"][1:])
    assert torch.equal(data["next", "physics"][:, :2].float(), data["next", "observation"])
    assert torch.equal(data["next", "reward"], data["next", "observation"].sum(1, keepdim=True))
    assert data["source"][:: ROWS * STEPS].tolist() == [0, 1, 2, 3]
    assert data["source"].unique().tolist() == [0, 1, 2, 3, 10, 20]
    assert data["observation"][:STEPS].unique(dim=0).shape == (STEPS, 2)
    # shards differ from one another
    assert not torch.equal(data["action"][: ROWS * STEPS], data["action"][ROWS * STEPS : 2 * ROWS * STEPS])


def test_manifest_says_what_made_the_data(whole):
    manifest = TransitionDataset.load(whole).manifest
    assert manifest["recipe"] == RECIPE
    assert manifest["domain"] == "toy"
    assert manifest["versions"][0]["torch"] == torch.__version__.split("+")[0]
    assert [path.name for path in whole.parent.iterdir() if not path.name.endswith(".lock")] == [whole.name]


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    collect(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_second_call_loads(tmp_path, capsys):
    collect(tmp_path, log=tmp_path / "log")
    assert "4 shards into" in capsys.readouterr().out
    collect(tmp_path, log=tmp_path / "log")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "3"]


def test_another_recipe_is_another_folder(tmp_path):
    first, second = collect(tmp_path), collect(tmp_path, {**RECIPE, "seed": 6})
    assert len(list(tmp_path.glob("toy-????????"))) == 2
    assert not torch.equal(first.data["action"], second.data["action"])


def test_folder_of_another_recipe_is_refused(tmp_path):
    collect(tmp_path)
    other = {**RECIPE, "noise": 0.2}
    dataset_folder(tmp_path, "toy", RECIPE).rename(dataset_folder(tmp_path, "toy", other))
    with pytest.raises(ValueError, match=r'expected a data set of the recipe .*"noise": 0.2.*, found .*"noise": 0.1'):
        collect(tmp_path, other)


def test_recipe_must_be_complete(tmp_path):
    with pytest.raises(ValueError, match="Expected the key 'seed' in the recipe of toy"):
        collect(tmp_path, {"domain": "toy", "shards": 1})


def test_long_shards_are_collected_in_batches(tmp_path):
    def factory(number: int, seed: int) -> Shard:
        shard = make_shard(number, seed)
        return Shard(Drift([1000] * ROWS), shard.policy, 250, shard.source)

    recipe = {**RECIPE, "shards": 1}
    dataset = collect_dataset(tmp_path, "toy", recipe, factory, expected_seconds=1)
    assert dataset.episode_lengths().tolist() == [250] * ROWS
    same = (dataset.data["next", "observation"][:-1] == dataset.data["observation"][1:]).all(1)
    assert torch.equal(same, dataset.data["episode"].diff() == 0)


def test_keep_cuts_episodes_short(tmp_path):
    def keep(collected: TensorDictBase) -> torch.Tensor:
        mask = torch.ones(ROWS, STEPS, dtype=torch.bool)
        mask[0, 5:] = False  # an episode that is cut
        mask[2, 0] = mask[2, 3] = False  # a gap splits an episode in two
        return mask

    def factory(number: int, seed: int) -> Shard:
        return replace(make_shard(number, seed), keep=keep)

    dataset = collect_dataset(tmp_path, "toy", {**RECIPE, "shards": 1}, factory, expected_seconds=1)
    data = dataset.data
    assert dataset.episode_lengths().tolist() == [5, 3, 3, 2, 2, 4]
    assert data["next", "truncated"].flatten().nonzero().flatten().tolist() == [4, 12, 14, 18]
    assert data["next", "physics"][:, 2].tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 3, 1, 2, 2, 3, 5, 6, 7, 8]
    assert data["source"].tolist() == [0] * 5 + [10] * 8 + [20] * 6


def test_unusable_shards_are_refused(tmp_path):
    def run(factory):
        collect_dataset(tmp_path, "toy", RECIPE, factory, expected_seconds=1)

    def keeping(keep):
        return lambda number, seed: replace(make_shard(number, seed), keep=keep)

    def bad_source(number: int, seed: int) -> Shard:
        shard = make_shard(number, seed)
        return Shard(shard.env, shard.policy, shard.steps, torch.zeros(7))

    def not_finite(number: int, seed: int) -> Shard:
        shard = make_shard(number, seed)
        return Shard(shard.env, lambda td: td.set("action", torch.full((ROWS, 2), torch.nan)), STEPS, shard.source)

    with pytest.raises(ValueError, match=r"Shard 0 of toy-.*: expected transitions to keep, found none"):
        run(keeping(lambda collected: torch.zeros(ROWS, STEPS, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"expected a bool mask \[3, 8\], found torch.float32 \[3, 8\]"):
        run(keeping(lambda collected: torch.ones(ROWS, STEPS)))
    with pytest.raises(ValueError, match=r"one source for each of 3 rows, found shape \[7\]"):
        run(bad_source)
    with pytest.raises(ValueError, match=r"Shard 0 of toy-.*: expected finite numbers in '(action|observation)'"):
        run(not_finite)
    collect(tmp_path)  # what went wrong before is no obstacle


def slow_collect(root: Path, pause: float, log: Path | None = None) -> None:
    torch.set_num_threads(1)
    collect(root, pause=pause, log=log)


def collect_slow_to_write(root: Path) -> None:
    """Leaves time to be killed while files are being written."""
    write = np.lib.format.write_array_header_1_0

    def slow_write(*args: object) -> None:
        time.sleep(0.05)
        write(*args)

    np.lib.format.write_array_header_1_0 = slow_write
    slow_collect(root, pause=0)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    # imported once, not in every process; tensordict imports the last two when it is first used
    context.set_forkserver_preload(
        ["datamodules.stored.collect", "pytest", "torchrl.data", "torchrl.envs", "pandas", "h5py"]
    )
    return context


def kill_when(process, condition) -> None:
    """SIGKILL the process as soon as the condition holds."""
    process.start()
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), "the process ended before the condition held"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("instant", "target", "args"),
    [
        ("*.partial", slow_collect, (0.02,)),
        ("*.partial/shard-00000", slow_collect, (0.02,)),
        ("*.partial/shard-00002", slow_collect, (0.02,)),
        ("*.partial/.saving-*.shard-00001/next.reward.npy", collect_slow_to_write, ()),
        (".saving-*.toy-????????/next.reward.npy", collect_slow_to_write, ()),
    ],
)
def test_killed_collection_continues_to_the_same_bytes(tmp_path, whole, processes, instant, target, args):
    process = processes.Process(target=target, args=(tmp_path, *args))
    kill_when(process, lambda: any(tmp_path.glob(instant)))
    folder = tmp_path / whole.name
    partial = tmp_path / f"{whole.name}.partial"
    assert not folder.exists()
    finished = len(list(partial.glob("shard-*")))
    collect(tmp_path, log=tmp_path / "log")
    made = (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
    assert made == [str(number) for number in range(finished, SHARDS)]  # finished shards are not made again
    assert contents(folder) == contents(whole)
    assert not partial.exists()
    assert not list(tmp_path.glob(".saving-*"))


def test_killed_before_tidying_up(tmp_path, whole):
    collect(tmp_path)
    partial = tmp_path / f"{whole.name}.partial"
    (partial / "shard-00000").mkdir(parents=True)  # what a kill just after the rename leaves behind
    collect(tmp_path, log=tmp_path / "log")
    assert not partial.exists()
    assert not (tmp_path / "log").exists()
    assert contents(tmp_path / whole.name) == contents(whole)


def test_second_process_waits_and_uses_what_the_first_made(tmp_path, whole, processes):
    workers = [processes.Process(target=slow_collect, args=(tmp_path, 0.02, tmp_path / "log")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "3"]
    assert contents(tmp_path / whole.name) == contents(whole)


def test_progress_without_a_terminal_is_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datamodules.stored.collect._LINE_SECONDS", 0.0)
    collect(tmp_path)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert len(lines) == 1 + SHARDS
    assert "4 shards into" in lines[0]
    assert "about 1 s" in lines[0]
    assert "2.0 of 4 shards" in lines[2]
    assert lines[2].endswith("left.")


def test_a_name_is_no_path(tmp_path):
    for name in ("../walker", "/walker", "a/b"):
        with pytest.raises(ValueError, match=f"^{name}: expected the name of a data set, found a path"):
            dataset_folder(tmp_path, name, {})
