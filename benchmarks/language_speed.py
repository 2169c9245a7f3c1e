"""Tokens per second of completing prompts and of updating an expert, by adapter, and the memory that it takes.

Each adapter runs in a process of its own, so that its peak of memory is its own:

    python -m benchmarks.language_speed --model data/smollm2-135m-instruct
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from functools import partial

import torch
from tensordict import TensorDict

from components.language.adapters import LowRankAdapter, SingularValueAdapter
from components.language.models import PretrainedFolder, smollm2
from lightning_modules.expert_training import ExpertTraining

ADAPTERS = {
    "svf composed": partial(SingularValueAdapter, modules="mlp"),
    "svf factorised": partial(SingularValueAdapter, modules="mlp", factorised=True),
    "lora": partial(LowRankAdapter, modules="attention", rank=16),
}


def report(name: str, arguments: argparse.Namespace) -> None:
    """Speed of one adapter; the base model's generation comes first, in the same process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = PretrainedFolder(arguments.model)
    tokenizer = folder.tokenizer
    module = ExpertTraining(
        ends=[len(tokenizer)],  # never drawn: all completions are as long
        language_model=folder,
        adapter=partial(ADAPTERS[name], layers=arguments.layers),
        optimizer=partial(torch.optim.Adam, lr=0.0),
        dtype=arguments.dtype,
        updates=1,
    ).to(device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(len(tokenizer), (arguments.batch, arguments.prompt), generator=generator).to(device)
    mask = torch.ones_like(prompt)
    ask = partial(module.complete, prompt, mask, most_tokens=arguments.completion)
    with module.language.adapter.base():
        plain = partial(module.language.complete, ends=module.ends, most_tokens=arguments.completion)
        base = timed(partial(plain, prompt, mask))
    asking = timed(ask)
    tokens, kept = ask()
    reward = torch.where(torch.arange(arguments.batch, device=device) % 2 == 0, 1.0, -1.0)
    batch = {"prompt": prompt, "prompt_mask": mask.bool(), "completion": tokens, "completion_mask": kept}
    data = TensorDict({**batch, "right": reward > 0, "reward": reward}, batch_size=[arguments.batch])

    def update() -> None:
        module.update(data)
        module.language.refresh()

    updating = timed(update)
    completed, passed = tokens.numel(), tokens.numel() + prompt.numel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"  {name:15s} {module.language.adapter.count():7d} numbers: completing {completed / asking:5.0f} tokens/s "
        f"({base / asking:.2f} times the base model), updating {passed / updating:6.0f} tokens/s, peak {peak:.1f} GB",
        flush=True,
    )


def timed(function: partial, seconds: float = 5.0) -> float:
    """Seconds of one call, the fastest of several."""
    function()
    times, until = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="data/smollm2-135m-instruct", help="folder (default: SmolLM2, made if need be)"
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (default)")
    parser.add_argument("--layers", default="all", help="all (default) or upper_half")
    parser.add_argument("--batch", type=int, default=24, help="prompts (default 24)")
    parser.add_argument("--prompt", type=int, default=30, help="tokens of a prompt (default 30)")
    parser.add_argument("--completion", type=int, default=6, help="tokens of a completion (default 6)")
    parser.add_argument("--adapter", choices=list(ADAPTERS), help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.adapter is not None:
        report(arguments.adapter, arguments)
        return
    if arguments.model == parser.get_default("model"):
        smollm2(arguments.model)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} cores"
    print(f"experts of a language model on {where}, {arguments.batch} prompts at once", flush=True)
    for name in ADAPTERS:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.language_speed", *sys.argv[1:], "--adapter", name], check=True
        )


if __name__ == "__main__":
    main()
