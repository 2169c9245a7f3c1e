"""An evaluation that takes as long as it is told to by the environment variable SLOW, in seconds for each step."""

import os
import time
from typing import Any

from tensordict import TensorDict

from datamodules.environments.overdrive import OverdriveTask
from datamodules.evaluation import Policy


class SlowTask(OverdriveTask):
    def run(self, policy: Policy, *arguments: Any) -> TensorDict:
        def slowly(seen):
            time.sleep(float(os.environ.get("SLOW", 0)))
            return policy(seen)

        return super().run(slowly, *arguments)
