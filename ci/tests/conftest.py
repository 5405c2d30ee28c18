"""Fixtures of the tests that start servers."""

import pytest

from ci.tests.processes import assert_nothing_left, what_the_tutorial_runs


@pytest.fixture
def nothing_left_behind():
    """Fails the test when a process that it started outlives it."""
    before = what_the_tutorial_runs()
    yield
    assert_nothing_left(before)
