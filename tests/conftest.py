"""What many tests need: small methods, their configuration, and programs run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from components.control.actor_objectives import AdvantageWeighted
from components.control.forward_backward import BackwardMap, ForwardMap, ZConditionedActor
from lightning_modules.forward_backward import ForwardBackward

ROOT = Path(__file__).resolve().parent.parent


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
            "actor_objective": AdvantageWeighted(),
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


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("file systems can't be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


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
