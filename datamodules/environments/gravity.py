"""Help for bodies that are to learn what they are too weak for at first: gravity that grows as rewards do."""

from torch import Tensor

from components.buildable import buildable
from components.checks import Number, Positive, Share, Size, checked


@buildable()
@checked
class GrowingGravity:
    """A curriculum: bodies begin in a part of their gravity, and more of it comes the better a rollout was.

    Forces on the root would lift a body too, but what they hold it with it does not learn to do, and half of the
    gravity is a task of the same kind as all of it.

    Args:
        start: share of gravity at first.
        goal: mean reward of all rows in a window, above which gravity grows.
        growth: by so much of the whole.
        window: control steps.
    """

    def __init__(self, start: Share = 0.25, goal: Number = 0.6, growth: Positive = 0.005, window: Size = 32) -> None:
        self.start, self.goal, self.growth, self.window = start, goal, growth, window

    def grown(self, share: Tensor, mean_reward: Tensor) -> Tensor:
        """The share of gravity after a window of this mean reward."""
        return (share + self.growth * (mean_reward > self.goal)).clamp(max=1.0)
