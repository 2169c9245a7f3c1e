"""What a start takes: seconds until help is there, and until a training says what it does and makes its first update.

python -m benchmarks.startup_speed [--repeats 3]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPERIMENTS = {
    "fb_overdrive": ("datamodule.dataset.episodes=20",),  # stored data, which the first, uncounted run collects
    "gpl_cheetah": ("datamodule.random_steps=20",),
}


def start(experiment: str, folder: str) -> dict[str, float]:
    """Seconds from the start of the program until its first lines, and until its first update is recorded."""
    settings = ("datamodule.updates_per_step=1", "module.log_every=1", f"output_root={folder}", f"data_root={folder}")
    command = [sys.executable, "train.py", f"experiment={experiment}", *EXPERIMENTS[experiment], *settings]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = {}
    try:
        for line in process.stdout:
            name = "first line" if not found else "configurations checked" if " arms, " in line else None
            if name is not None:
                found[name] = time.monotonic() - began
            if line.startswith("Writing to "):
                break
        run = Path(line.removeprefix("Writing to ").strip())
        while process.poll() is None and not any(run.glob("*/*/train.csv")):
            time.sleep(0.01)
        found["first update"] = time.monotonic() - began
    finally:
        process.kill()
        process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    for repeat in range(repeats + 1):
        began = time.monotonic()
        subprocess.run([sys.executable, "train.py", "--help"], stdout=subprocess.DEVNULL, check=True)
        if repeat:  # the first compiles
            print(f"--help: {time.monotonic() - began:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        for experiment in EXPERIMENTS:
            for repeat in range(repeats + 1):
                found = start(experiment, folder)
                if repeat:
                    print(f"{experiment}: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in found.items())}")


if __name__ == "__main__":
    main()
