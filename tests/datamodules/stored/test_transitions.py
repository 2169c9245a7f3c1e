import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from datamodules.stored.transitions import MANIFEST, TransitionDataset, write_dataset


def make_dataset(lengths=(3, 2), domain="toy", physics=True, observation_dim=4, seed=0) -> TransitionDataset:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    terminated = torch.rand(n, 1, generator=generator) < 0.3
    episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    data = TensorDict(
        {
            "observation": torch.randn(n, observation_dim, generator=generator),
            "action": torch.randn(n, 2, generator=generator),
            "next": {
                "observation": torch.randn(n, observation_dim, generator=generator),
                "reward": torch.randn(n, 1, generator=generator),
                "terminated": terminated,
                "truncated": ~terminated,
                "done": torch.ones(n, 1, dtype=torch.bool),
            },
            "episode": episode,
            "source": episode * 10,
        },
        batch_size=[n],
    )
    if physics:
        data["next", "physics"] = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return TransitionDataset(data, {"domain": domain, "made_by": "test", "seed": seed})


def assert_same(found: TransitionDataset, expected: TransitionDataset) -> None:
    assert set(found.data.keys(True, True)) == set(expected.data.keys(True, True))
    for key, value in expected.data.items(True, True):
        assert found.data[key].dtype == value.dtype
        assert torch.equal(found.data[key], value), key


@pytest.mark.parametrize("physics", [True, False])
def test_round_trip(tmp_path, physics):
    dataset = make_dataset(physics=physics)
    dataset.save(tmp_path / "made" / "set")
    loaded = TransitionDataset.load(tmp_path / "made" / "set", "toy")
    assert_same(loaded, dataset)
    assert (len(loaded), loaded.episodes, loaded.observation_dim, loaded.action_dim) == (5, 2, 4, 2)
    assert loaded.manifest.items() >= {"made_by": "test", "seed": 0, "transitions": 5, "episodes": 2}.items()
    assert loaded.manifest["files"]["next.reward"]["shape"] == [5, 1]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["set"]  # nothing temporary is left
    # what was loaded can be saved again, and the files are the same
    loaded.save(tmp_path / "again")
    assert TransitionDataset.load(tmp_path / "again").manifest == loaded.manifest


def test_writing_to_loaded_tensors_leaves_the_files_alone(tmp_path):
    make_dataset().save(tmp_path / "set")
    TransitionDataset.load(tmp_path / "set").data["observation"].zero_()
    assert_same(TransitionDataset.load(tmp_path / "set"), make_dataset())


def test_concatenation_numbers_episodes_through(tmp_path):
    parts = [make_dataset((3, 2), seed=0), make_dataset((4,), seed=1)]
    write_dataset(tmp_path / "set", parts, {"domain": "toy"})
    data = TransitionDataset.load(tmp_path / "set").data
    assert data["episode"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert torch.equal(data["observation"], torch.cat([part.data["observation"] for part in parts]))


def test_concatenation_needs_equal_entries(tmp_path):
    with pytest.raises(ValueError, match=r"'observation': expected width \[4\] in every part, found width \[5\]"):
        write_dataset(tmp_path / "set", [make_dataset(), make_dataset(observation_dim=5)], {"domain": "toy"})
    with pytest.raises(ValueError, match="found none"):
        write_dataset(tmp_path / "set", [make_dataset(), make_dataset(physics=False)], {"domain": "toy"})
    with pytest.raises(ValueError, match="only a later part has"):
        write_dataset(tmp_path / "set", [make_dataset(physics=False), make_dataset()], {"domain": "toy"})
    assert list(tmp_path.iterdir()) == []


def test_saving_never_overwrites(tmp_path):
    make_dataset(seed=0).save(tmp_path / "set")
    with pytest.raises(FileExistsError, match="nothing was written"):
        make_dataset(seed=1).save(tmp_path / "set")
    assert_same(TransitionDataset.load(tmp_path / "set"), make_dataset(seed=0))


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("components.files.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        make_dataset().save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_episode_helpers():
    dataset = make_dataset((3, 1, 2))
    assert dataset.episode_lengths().tolist() == [3, 1, 2]
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 5.0])
    assert dataset.episode_returns(reward).tolist() == [6.0, 10.0, 9.0]
    tasks = dataset.episode_returns(torch.stack([reward, -reward], dim=1))
    assert tasks.tolist() == [[6.0, -6.0], [10.0, -10.0], [9.0, -9.0]]
    assert tasks.dtype == torch.float32
    with pytest.raises(ValueError, match="one reward for each of 6 transitions, found 5"):
        dataset.episode_returns(reward[:5])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("observation", torch.zeros(5, 4, dtype=torch.float64), "'observation': expected torch.float32, found"),
        (("next", "observation"), torch.zeros(5, 3), r"'next.observation': expected shape \[5, 4\], found \[5, 3\]"),
        ("action", torch.zeros(5), r"'action': expected shape \[5, width\], found \[5\]"),
        (("next", "done"), torch.zeros(5, dtype=torch.bool), r"'next.done': expected shape \[5, 1\]"),
        ("episode", torch.tensor([0, 0, 2, 2, 2]), "'episode': expected indices that start at 0"),
        ("episode", torch.tensor([1, 1, 1, 1, 1]), "'episode': expected indices that start at 0"),
        ("source", torch.zeros(5, 1, dtype=torch.int64), r"'source': expected shape \[5\]"),
        ("pixels", torch.zeros(5, 1), "found 'pixels'"),
    ],
)
def test_wrong_entries_are_refused(key, value, message):
    data = make_dataset().data.clone()
    data[key] = value
    with pytest.raises(ValueError, match=message):
        TransitionDataset(data, {"domain": "toy"})


def test_missing_entries_and_domain_are_refused():
    data = make_dataset().data
    with pytest.raises(ValueError, match="Expected the entry 'action'"):
        TransitionDataset(data.exclude("action"), {"domain": "toy"})
    with pytest.raises(ValueError, match="'domain', found none"):
        TransitionDataset(data, {})
    with pytest.raises(ValueError, match="n > 0"):
        TransitionDataset(data[:0], {"domain": "toy"})


@pytest.fixture
def saved(tmp_path) -> Path:
    make_dataset().save(tmp_path / "set")
    return tmp_path / "set"


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_load_of_a_missing_folder_or_file(saved):
    with pytest.raises(FileNotFoundError, match="nowhere: expected the folder of a data set"):
        TransitionDataset.load(saved.parent / "nowhere")
    (saved / "action.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"action.npy: expected a file of \d+ bytes"):
        TransitionDataset.load(saved)
    (saved / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="expected the manifest"):
        TransitionDataset.load(saved)


def test_load_of_another_domain(saved):
    with pytest.raises(ValueError, match="expected a data set of domain 'humanoid', found 'toy'"):
        TransitionDataset.load(saved, "humanoid")


def test_load_of_a_truncated_file(saved):
    path = saved / "next.observation.npy"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"next.observation.npy: expected 208 bytes, found 201; the file is truncated"):
        TransitionDataset.load(saved)


def test_load_of_a_corrupt_file(saved):
    content = bytearray((saved / "next.physics.npy").read_bytes())
    content[-1] ^= 1
    (saved / "next.physics.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"next.physics.npy: expected checksum \w{8}, found \w{8}"):
        TransitionDataset.load(saved)


def test_load_of_another_shape(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["files"]["action"]["shape"] = [5, 3]
    edit_manifest(saved, files=manifest["files"])
    with pytest.raises(ValueError, match=r"action.npy: expected float32 \[5, 3\] as in manifest.json, found"):
        TransitionDataset.load(saved)
    del manifest["files"]["action"]
    edit_manifest(saved, files=manifest["files"])
    with pytest.raises(ValueError, match="set: Expected the entry 'action'"):
        TransitionDataset.load(saved)


def test_load_of_a_damaged_manifest(saved):
    edit_manifest(saved, format=99)
    with pytest.raises(ValueError, match="format 1, found format 99"):
        TransitionDataset.load(saved)
    edit_manifest(saved, format=1, files={"../../secret": {"bytes": 1, "crc32": "0", "shape": [1], "dtype": "x"}})
    with pytest.raises(ValueError, match="expected records of the files"):
        TransitionDataset.load(saved)
    edit_manifest(saved, files=None)
    with pytest.raises(ValueError, match=r"manifest.json.files: expected values by their names, found nothing"):
        TransitionDataset.load(saved)
    records = {"action": {"bytes": 1, "crc32": "0", "shape": [-1], "dtype": "x"}}
    edit_manifest(saved, files=records)
    with pytest.raises(ValueError, match=r"manifest.json.files.action.shape\[0\]: expected a whole number from 0 to"):
        TransitionDataset.load(saved)
    edit_manifest(saved, domain=5)
    with pytest.raises(ValueError, match=r"manifest.json.domain: expected a text or nothing, found 5"):
        TransitionDataset.load(saved)
    (saved / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest.json: expected JSON"):
        TransitionDataset.load(saved)
    (saved / MANIFEST).write_text('{"format": 1, "fil')
    with pytest.raises(ValueError, match=r"manifest.json: expected JSON"):
        TransitionDataset.load(saved)


@pytest.mark.parametrize("entry", ["action", ("next", "observation"), ("next", "reward")])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(entry, value):
    made = make_dataset()
    made.data[entry][3, 0] = value
    name = entry if isinstance(entry, str) else ".".join(entry)
    with pytest.raises(ValueError, match=rf"^Entry '{name}', row 3: expected finite numbers, found \[{value}"):
        TransitionDataset(made.data, made.manifest)


def test_large_numbers_are_finite_also_where_their_sum_is_not():
    made = make_dataset()
    made.data["observation"].fill_(3e38)
    TransitionDataset(made.data, made.manifest)
