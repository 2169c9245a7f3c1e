"""D4RL's normalised scores, between those of a random and of an expert policy."""

from typing import Any

from tensordict import TensorDictBase

from datamodules.evaluation import EvaluationTask

# returns of a random and of an expert policy: the ends of the D4RL score, by the beginning of the data set's name
_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "pen": (96.262799, 3076.8331),
    "hammer": (-274.856578, 12794.1348),
    "door": (-56.512833, 2880.5693),
    "relocate": (-6.425911, 4233.8778),
}


def d4rl_normalized_score(env: str, episode_return: float) -> float:
    """The D4RL score of a return: 0 for a random policy, 100 for an expert.

    Args:
        env: name of the environment or data set, e.g. "hopper-medium-replay-v2".
        episode_return: undiscounted sum of the environment's own rewards, neither shifted nor scaled.

    Raises:
        ValueError: D4RL has no reference returns for `env`.
    """
    for family, (low, high) in _RETURNS.items():
        if env == family or env.startswith(f"{family}-"):
            return 100 * (episode_return - low) / (high - low)
    raise ValueError(f"Expected a D4RL environment of one of {', '.join(_RETURNS)}; found {env!r}.")


class D4RLTask(EvaluationTask):
    """Adds D4RL's normalised score to every return: 0 for a random policy, 100 for an expert.

    Args:
        data_name: D4RL's name of the data set, or of the body.
    """

    def __init__(self, *arguments: Any, data_name: str) -> None:
        super().__init__(*arguments)
        self.data_name = data_name

    @property
    def metric_names(self) -> list[str]:
        returns = super().metric_names
        return [*(f"{name.removesuffix('return')}score" for name in returns), *returns]

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        returns = result["return"].tolist()
        scores = [[d4rl_normalized_score(self.data_name, value) for value in values] for values in returns]
        return dict(zip(self.metric_names, [*scores, *returns]))
