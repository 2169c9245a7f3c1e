"""REINFORCE for sequences of tokens (Williams, 1992), with what codes for language models add to it.

Dimensions: B sequences, T tokens.
"""

import torch
from torch import Tensor

from components.distributed import average_, broadcast_, world_size

BASELINES = ("none", "batch_mean", "leave_one_out")


def shaped_rewards(
    reward: Tensor, *, baseline: str = "none", normalise: bool = False, clip: float | None = None
) -> Tensor:
    """What log-probabilities are weighted by, [B], of the rewards [B] of a batch that may lie on several processes.

    Args:
        reward: of this process' sequences.
        baseline: taken off each reward: nothing, the mean of the batch (``batch_mean``), or that of all others
            (``leave_one_out``, which keeps the gradient's mean).
        normalise: to mean 0 and standard deviation 1 (the population's) over the batch; rewards that are all the same
            become 0.
        clip: largest absolute value, after all else; None for none.
    """
    if baseline not in BASELINES:
        raise ValueError(f"Unknown baseline={baseline!r}: expected one of {', '.join(BASELINES)}.")
    count = len(reward) * world_size()
    if baseline == "leave_one_out" and count < 2:
        raise ValueError("baseline=leave_one_out: expected batches of at least two sequences.")
    shaped = reward
    if baseline != "none" or normalise:
        # Seen from one of them, for of equal rewards rounding must leave nothing.
        origin = reward[0].clone()
        broadcast_(origin)
        shaped = reward - origin
        mean = shaped.mean()
        average_([mean])
        shaped = shaped - ((count * mean - shaped) / (count - 1) if baseline == "leave_one_out" else mean)
    if normalise:
        variance = shaped.square().mean()
        average_([variance])
        shaped = shaped / variance.sqrt().clamp(min=1e-7)
    return shaped if clip is None else shaped.clamp(-clip, clip)


def policy_loss(log_probs: Tensor, mask: Tensor, weight: Tensor, mean_over_tokens: bool = False) -> Tensor:
    """Of each sequence [B], whose gradient is REINFORCE's: minus its weight times its log-probability.

    Args:
        log_probs: of tokens [B, T].
        mask: tokens that count, [B, T].
        weight: [B], without gradient.
        mean_over_tokens: take the mean of a sequence's tokens instead of their sum: long ones weigh no more than short.
    """
    kept = torch.where(mask, log_probs, 0.0).sum(1)
    if mean_over_tokens:
        kept = kept / mask.sum(1).clamp(min=1)
    return -weight.detach() * kept
