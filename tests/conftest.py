"""What many tests need: small methods, their configuration, and programs run as a user runs them."""

import builtins
import errno
import gc
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tensordict import TensorDict

from components.control.actor_objectives import AdvantageWeighted
from components.control.forward_backward import BackwardMap, ForwardMap, ZConditionedActor
from lightning_modules.forward_backward import ForwardBackward

ROOT = Path(__file__).resolve().parent.parent
yaml.SafeLoader = yaml.CSafeLoader  # OmegaConf's own loader derives from it: configurations are read ten times as fast


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of whole programs, which take longest: the last files of several workers should be short."""
    items.sort(key=lambda item: item.path.parent != ROOT / "tests" / "launch")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: it would go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def small_agent() -> Callable[..., ForwardBackward]:
    """Makes a small forward-backward agent; arguments override its settings."""

    def make(observation_dim: int = 5, action_dim: int = 2, blocks: int = 1, hidden: int = 16, **settings: Any):
        torch.manual_seed(0)
        defaults = {
            "features": 8,
            "groups": 4,
            "discount": 0.9,
            "updates": 100,
            "objective": AdvantageWeighted(),
            "forward_map": partial(ForwardMap, hidden_dim=hidden),
            "backward_map": partial(BackwardMap, hidden_dim=hidden, blocks=blocks),
            "actor": partial(ZConditionedActor, hidden_dim=hidden),
        }
        return ForwardBackward([observation_dim], action_dim, **{**defaults, **settings})

    return make


@pytest.fixture
def transitions() -> Callable[..., TensorDict]:
    """Makes random transitions [n] that all entries of a batch need."""

    def make(n: int = 32, observation_shape: Sequence[int] = (5,), action_dim: int = 2, seed: int = 0) -> TensorDict:
        generator = torch.Generator().manual_seed(seed)

        def observations() -> torch.Tensor:
            if len(observation_shape) == 1:
                return torch.randn(n, *observation_shape, generator=generator)
            return torch.randint(256, (n, *observation_shape), generator=generator, dtype=torch.uint8)

        return TensorDict(
            {
                "observation": observations(),
                "action": 2 * torch.rand(n, action_dim, generator=generator) - 1,
                "next": {
                    "observation": observations(),
                    "reward": torch.randn(n, 1, generator=generator),
                    "terminated": torch.rand(n, 1, generator=generator) < 0.1,
                },
            },
            batch_size=[n],
        )

    return make


@pytest.fixture(scope="session")
def run_program() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a program of the project as a user would and returns what it printed and its exit code."""

    def run(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


SMALL = 8 * 2**20


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file system of 8 MB; where none may be mounted, a folder in which Python finds no more room than on one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "none", folder], capture_output=True).returncode:
        bound(folder, monkeypatch)
        yield folder
        return
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to write more than SMALL bytes to a folder, as the system would, and to say that there is more room."""
    opened, disk_usage = io.open, shutil.disk_usage

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

    def free() -> int:
        found = [path.stat() for path in folder.rglob("*") if path.is_file()]
        return SMALL - sum(min(512 * each.st_blocks, -(-each.st_size // 4096) * 4096) for each in found)

    class Bound(io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) > free():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def open_bound(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *others: Any, **more: Any
    ):
        if not inside(file) or not set(mode) & set("wax"):
            return opened(file, mode, buffering, encoding, *others, **more)
        raw = io.BufferedWriter(Bound(file, mode.replace("b", "").replace("t", "")))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding, *others, **more)

    monkeypatch.setattr(io, "open", open_bound)
    monkeypatch.setattr(builtins, "open", open_bound)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free()) if inside(path) else disk_usage(path)
    )


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory) -> Path:
    """The folder of a tiny random language model whose tokens are characters."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("language_model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        chat_template="{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}<end>{% endfor %}[assistant]",
    ).save_pretrained(folder)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(alphabet) + 1,
        "eos_token_id": len(alphabet),
        "initializer_range": 0.5,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return folder
