"""Fixtures that checks and tests share, and the table of promises at the end of a run."""

import os
import re

import pytest

from ci.common import NOTEBOOKS, ROOT, all_headings, read_notebook, troubleshooting

REPOSITORY = "The repository"  # The section of what isn't on the page


@pytest.fixture(scope="session")
def notebook():
    return read_notebook()


@pytest.fixture(scope="session", params=NOTEBOOKS)
def each_notebook(request):
    return read_notebook(request.param)


@pytest.fixture(scope="session")
def cell():
    """The source of the cell with a given id, of any notebook."""
    cells = [cell for name in NOTEBOOKS for cell in read_notebook(name).cells]
    sources = {cell.id: cell.source for cell in cells}
    assert len(sources) == len(cells), "Two cells have the same id"
    return sources.__getitem__


@pytest.fixture(scope="session")
def quoted():
    """Check that what the troubleshooting quotes was really said. `...` in a quotation stands for anything."""
    text = troubleshooting()

    def quoted(quotation: str, said: str) -> None:
        assert f'"{quotation}"' in text, f"The text doesn't quote: {quotation}"
        pattern = ".*".join(map(re.escape, quotation.split("...")))
        assert re.search(pattern, " ".join(said.split())), f"{quotation}\nis quoted, but this was said:\n{said}"

    return quoted


def pytest_collection_modifyitems(items):
    """Each test says which section of the page it holds to its word. nbmake's own item is the page itself."""
    known = {REPOSITORY, *all_headings()}
    for item in items:
        marker = item.get_closest_marker("section")
        if marker is None and item.path.is_relative_to(ROOT / "ci"):
            raise pytest.UsageError(f"{item.nodeid}: mark it with pytest.mark.section(...)")
        if marker and marker.args[0] not in known:
            raise pytest.UsageError(f"{item.nodeid}: the page has no section {marker.args[0]!r}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker = item.get_closest_marker("section")
    report.promise = (marker.args[0] if marker else REPOSITORY, item.originalname if marker else item.name)


def pytest_terminal_summary(terminalreporter):
    """A line for each promise: the section of the page, the check, its cases, and the result."""
    results, order = {}, [*all_headings(), REPOSITORY]
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if hasattr(report, "promise") and (report.when == "call" or outcome != "passed"):
                results.setdefault(report.promise, []).append(outcome)
    rows = [
        (section, name.removeprefix("test_").replace("_", " "), len(outcomes), max(outcomes, key="passed".__ne__))
        for (section, name), outcomes in sorted(results.items(), key=lambda one: order.index(one[0][0]))
    ]
    if rows:
        terminalreporter.section("promises of the page, and what was found")
        width = max(len(section) for section, *_ in rows)
        for section, name, cases, outcome in rows:
            terminalreporter.line(f"{outcome:7} {section:{width}}  {name}{f' ({cases} cases)' if cases > 1 else ''}")


@pytest.hookimpl(tryfirst=True)  # Before pytest itself skips it
def pytest_runtest_setup(item):
    """Where CI says that nothing may be skipped, a missing program fails the tests that need it."""
    if os.environ.get("NOTHING_SKIPPED"):
        for marker in item.iter_markers("skipif"):
            if marker.args[0]:
                pytest.fail(f"NOTHING_SKIPPED is set, and {marker.kwargs['reason']}")
