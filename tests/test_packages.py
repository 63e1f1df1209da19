"""The wheel is reproducible bit for bit, and the sdist builds it and passes tests of its own."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ["llama", "pyproject.toml", "README.md", "LICENSE", ".gitignore"]  # for a wheel


def build(tree: Path, target: str, out: Path, **environment: str) -> Path:
    """Build the target, wheel or sdist, from a tree. Returns the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, env=os.environ | environment)
    (file,) = out.iterdir()
    return file


def copy(folder: Path, seconds: int, mode: int) -> Path:
    """A copy of what a wheel is made of, whose files have another time and mode."""
    folder.mkdir(parents=True)
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))
        if path.is_file():
            path.chmod(mode)
    return folder


def test_wheels_are_reproducible(tmp_path: Path) -> None:
    first = copy(tmp_path / "first", 1_600_000_000, 0o644)
    second = copy(tmp_path / "another" / "folder", 1_700_000_000, 0o600)
    epoch = "1750000000"  # what a release sets
    one = build(first, "wheel", tmp_path / "one", SOURCE_DATE_EPOCH=epoch, TZ="UTC")
    other = build(second, "wheel", tmp_path / "other", SOURCE_DATE_EPOCH=epoch, TZ="Asia/Tokyo")
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_the_sdist_builds_and_passes_its_tests(tmp_path: Path) -> None:
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    from_sdist = build(tree, "wheel", tmp_path / "from_sdist")
    from_tree = build(copy(tmp_path / "tree", 1_600_000_000, 0o644), "wheel", tmp_path / "wheel")
    assert from_sdist.read_bytes() == from_tree.read_bytes()

    tests = ["tests/test_layout.py", "tests/test_bundled.py", "tests/test_config.py"]
    tests += ["tests/test_docs.py", "tests/test_tokenizer.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tree, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
