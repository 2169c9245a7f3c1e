"""Controllers that know nothing of the body: the actions of a data set's unskilled part.

Dimensions: N rows (environments), u controls.
"""

import math

import torch
from torch import Tensor, nn

KINDS = ("ornstein_uhlenbeck", "held_uniform", "sinusoids")


class ExplorationController(nn.Module):
    """Drives every row with one of three kinds of random actions, drawn per row.

    - `ornstein_uhlenbeck`: noise that reverts to zero at a rate of 0.1 per step, with steps of 0.3;
    - `held_uniform`: uniform actions, each held for a number of steps that is the row's own, 1 to 20;
    - `sinusoids`: per control an amplitude up to 1, a frequency of 0.5 to 3 Hz and a phase.

    Call it once per control step: it counts them. Its clock, its noise and its random state are in `state_dict()`.

    Args:
        rows: N.
        controls: u.
        control_seconds: duration of a control step.
        seed: of everything.
    """

    def __init__(self, rows: int, controls: int, control_seconds: float, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("kind", torch.randint(len(KINDS), (rows, 1), generator=self.generator))
        self.register_buffer("hold", torch.randint(1, 21, (rows, 1), generator=self.generator))
        self.register_buffer("amplitude", self._uniform(rows, controls))
        hertz = 0.5 + 2.5 * self._uniform(rows, controls)
        self.register_buffer("radians_per_step", 2 * math.pi * control_seconds * hertz)
        self.register_buffer("phase", 2 * math.pi * self._uniform(rows, controls))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.register_buffer("noise", torch.zeros(rows, controls))
        self.register_buffer("held", torch.zeros(rows, controls))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def get_extra_state(self) -> Tensor:
        """The random state, so that `state_dict` is complete."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the random state."""
        self.generator.set_state(state.cpu())

    def forward(self, physics: Tensor) -> Tensor:
        """Actions [N, u] in [-1, 1] whatever the physics [N, p]; counts one control step."""
        shape = self.noise.shape
        self.noise = 0.9 * self.noise + 0.3 * torch.randn(shape, generator=self.generator)
        drawn = 2 * self._uniform(*shape) - 1
        self.held = torch.where(self.clock % self.hold == 0, drawn, self.held)
        waves = self.amplitude * torch.sin(self.phase + self.radians_per_step * self.clock)
        self.clock = self.clock + 1
        action = torch.where(self.kind == 0, self.noise, torch.where(self.kind == 1, self.held, waves))
        return action.clamp(-1, 1)
