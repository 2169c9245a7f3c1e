"""Drawing with probabilities that change: a tree of log-sums over the logits of N rows, in tensors.

Dimensions: N rows, B rows drawn or changed together, R children of a node.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from components.checks import Count, checked

_FANOUT = 128
_BELOW_ONE = 1 - 1e-12


@checked
class PriorityTree(nn.Module):
    """Draws row i with probability exp(l_i) / sum_j exp(l_j); a draw and a change of B rows cost O(B R log_R N).

    Priorities p of prioritised experience replay (arXiv 1511.05952) are logits log p; those of advantage-sampled
    actor-critics (arXiv 2403.13097) are advantages over a temperature. No call waits for the device. Numbers are of
    double precision: in single precision, sums over a million rows lose the small ones.

    Args:
        rows: N; all logits are 0 at first.
        device: where the tree lies.
    """

    def __init__(self, rows: Count, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rows = rows
        level = torch.zeros(rows, dtype=torch.float64, device=device)
        self.depth = 0
        while True:
            padding = -len(level) % _FANOUT
            level = torch.cat([level, level.new_full((padding,), -math.inf)]).view(-1, _FANOUT)
            self.register_buffer(f"level_{self.depth}", level)  # [nodes, R], leaves first
            self.depth += 1
            if len(level) == 1:
                break
            level = level.logsumexp(-1)

    def _levels(self) -> list[Tensor]:
        return [self.get_buffer(f"level_{depth}") for depth in range(self.depth)]

    @property
    def logits(self) -> Tensor:
        """[N]."""
        return self.level_0.flatten()[: self.rows]

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Rows whose share of the cumulative distribution has these numbers in it, and their log-probabilities.

        Args:
            uniform: [B] of double precision, from 0 to less than 1; (j + U_j) / B is a stratified draw.

        Returns:
            Indices [B] and log-probabilities [B].
        """
        node, left, log_prob = torch.zeros_like(uniform, dtype=torch.int64), uniform, torch.zeros_like(uniform)
        for level in reversed(self._levels()):
            log_shares = level[node].log_softmax(-1)  # [B, R]
            ends = log_shares.exp().cumsum(-1)
            target = (left * ends[:, -1]).minimum(ends[:, -1] * _BELOW_ONE)
            child = (ends <= target.unsqueeze(-1)).sum(-1)
            chosen = log_shares.gather(-1, child.unsqueeze(-1)).squeeze(-1)
            share = chosen.exp()
            left = (1 - (ends.gather(-1, child.unsqueeze(-1)).squeeze(-1) - target) / share).clamp(0.0, _BELOW_ONE)
            log_prob = log_prob + chosen
            node = node * _FANOUT + child
        return node, log_prob

    def change(self, index: Tensor, logit: Tensor) -> None:
        """Set the logits [B] of rows [B]; of a row that comes several times, the last counts."""
        order = index.argsort(stable=True)
        index, logit = index[order], logit[order].to(torch.float64)
        place = torch.arange(len(index), device=index.device)
        ends = torch.ones_like(index, dtype=torch.bool)
        ends[:-1] = index[1:] != index[:-1]
        last = torch.where(ends, place, len(index)).flip(0).cummin(0).values.flip(0)
        values = logit[last]
        for depth, level in enumerate(self._levels()):
            level.view(-1)[index] = values  # equal for equal indices
            index = index // _FANOUT
            if depth + 1 < self.depth:
                values = level[index].logsumexp(-1)

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError unless a `state_dict` is one of a tree of as many rows."""
        if not isinstance(state, Mapping):
            raise ValueError(f"priorities: expected those of {self.rows} rows, found {type(state).__name__}.")
        for name, expected in self.state_dict().items():
            found = state.get(name)
            right = isinstance(found, Tensor) and found.is_floating_point() and found.shape == expected.shape
            if not right or found.isnan().any():
                raise ValueError(f"priorities.{name}: expected numbers {list(expected.shape)}, found others.")
