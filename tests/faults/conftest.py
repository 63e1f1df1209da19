"""The fixture that counts the trials of the fault plan."""

from collections.abc import Iterator

import pytest
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
