"""The fixture that counts the trials of the fault plan, and folders that a test may damage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.damaged import write_layouts
from helpers.fault_plan import LINES, RESULTS, Trials, write


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Iterator[Trials]:
    """Counts the trials of a test that has a mark `fault`. The test fails if a trial failed."""
    marker = request.node.get_closest_marker("fault")
    (line,) = marker.args
    assert line in LINES
    trials = Trials()
    yield trials
    assert trials.made
    if RESULTS:
        write(request.node.name, line, trials)
    assert trials.failures == []


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model in three layouts; see `write_layouts`."""
    return write_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def folders(layouts: Path, tmp_path: Path) -> Path:
    """A copy of the layouts, which the test may damage."""
    return Path(shutil.copytree(layouts, tmp_path / "checkpoints"))
