"""What an installation of the wheel holds and does."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the wheel's packages are installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    before = set(ROOT.iterdir())
    build = [
        sys.executable,
        "-m",
        "uv",
        "build",
        "--wheel",
        "--offline",
        "--quiet",
        "--out-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=60)
    assert set(ROOT.iterdir()) == before  # nothing is left beside the sources
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def start(installed: Path, script: str, *arguments: str, others: Path | None = None) -> subprocess.CompletedProcess:
    """A console script as an installation makes it, from a folder of the user's."""
    scripts = configparser.ConfigParser()
    scripts.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    module, function = scripts["console_scripts"][script].split(":")
    code = f"import sys; sys.argv[0] = {script!r}; from {module} import {function} as main; sys.exit(main())"
    path = os.pathsep.join(str(folder) for folder in (others, installed) if folder is not None)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_wheel_holds_all_configurations_and_modules(installed):
    packages = [path.name for path in installed.iterdir() if path.suffix != ".dist-info"]
    assert "tenfold" in packages
    for package in packages:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".yaml", ".safetensors", ".json"):
                assert (installed / path.relative_to(ROOT)).exists(), path
    assert not {"tests", "benchmarks", "train.py", "evaluate.py"} & set(packages)


def test_programs_of_an_installation_start_from_anywhere(installed):
    helped = start(installed, "tenfold-train", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "fb_overdrive" in helped.stdout
    refused = start(installed, "tenfold-evaluate", "ckpt_path=nowhere")
    assert refused.returncode == 1
    assert refused.stderr.startswith("ckpt_path=nowhere: expected a checkpoint or a folder with one in nowhere")


@pytest.mark.parametrize("clash", ["components/__init__.py", "launch.py"])
def test_a_package_of_the_same_name_is_one_sentence(installed, tmp_path, clash):
    (tmp_path / clash).parent.mkdir(exist_ok=True)
    (tmp_path / clash).touch()
    name = clash.split("/")[0].removesuffix(".py")
    found = start(installed, "tenfold-train", "--help", others=tmp_path)
    assert found.returncode == 1
    assert found.stderr.startswith(
        f"{name}: expected the package of that name which Tenfold has in {installed}, found "
    )
    assert found.stderr.count("\n") == 1
    (tmp_path / clash).unlink()
    (tmp_path / name).mkdir(exist_ok=True)  # a folder without modules, such as one of pictures, hides nothing
    found = start(installed, "tenfold-train", "--version", others=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("Hydra ")
