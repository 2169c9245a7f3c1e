"""Drawing dm_control's tasks, in processes of their own where several draw at once.

Nothing in here imports torch or TorchRL, so that such a process is ready in a second and stays small.
"""


class RenderingUnavailable(ValueError):
    """No graphics library works here; whoever can do without pictures skips them."""
