"""What documents say of the code is what the code has."""

from pathlib import Path

from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import DOMAINS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(name: str) -> str:
    """The measurements of a body, as docs/rewards.md lists them."""
    widths = BatchedMujocoEnv(name, num_threads=1).measurement_widths
    lines = [f"## {name}", "", "| measurement | numbers | what it is |", "|---|---:|---|"]
    for measured, quantity in DOMAINS[name].measurements.items():
        lines.append(f"| `{measured}` | {max(1, widths[measured])} | {quantity.meaning} |")
    return "\n".join(lines)


def test_every_measurement_is_in_the_tables_of_rewards():
    text = (DOCS / "rewards.md").read_text()
    for name in DOMAINS:
        assert table(name) in text, table(name)
