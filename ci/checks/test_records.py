"""What the page shows of a run is what that run printed and drew, with the code that the page shows."""

import pytest

from ci.common import ROOT, code_cells, read_notebook
from ci.tools import record

pytestmark = pytest.mark.section("The repository")


def test_recorded_parts_are_those_of_the_records(each_notebook, monkeypatch, tmp_path):
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)
    parts = {cell.id: cell.source for cell in record.with_parts(each_notebook)}
    shown = {cell.id: cell.source for cell in each_notebook.cells}
    different = [name for name in shown.keys() | parts.keys() if shown.get(name) != parts.get(name)]
    assert not different, f"Run `make record`: {sorted(different)}"
    for picture in (tmp_path / "images").iterdir():
        kept = ROOT / "images" / picture.name
        assert picture.read_bytes() == kept.read_bytes(), f"Run `make record`: {picture.name} isn't the record's"


def test_recorded_parts_are_not_older_than_their_code():
    old = record.outdated([read_notebook(name) for name in record.NOTEBOOKS])
    assert not old, f"Recorded before their code changed: {old}. CONTRIBUTING.md says how to record again."


@pytest.mark.parametrize("name, run", zip(record.NOTEBOOKS, ["stand-in", "beyond-chat"], strict=True))
def test_cells_that_print_or_draw_show_what_a_run_gave(name, run):
    one = record.read_records()[run]
    for cell in code_cells(read_notebook(name)):
        text, picture = record.outputs(one, cell.id)
        silent = not text and not picture or text.startswith(("Overwriting ", "Writing "))
        account = "skip-execution" in cell.metadata.get("tags", [])
        assert (cell.id in record.PARTS) != (silent or account), f"{cell.id}: PARTS of ci/tools/record.py"
        assert bool(picture) == (cell.id in record.FIGURES), f"{cell.id}: FIGURES of ci/tools/record.py"


def test_records_say_what_was_run_and_when():
    for name, one in record.read_records().items():
        said = one.metadata.recorded
        assert all(word in said for word in ("Ray ", "vLLM ", ", 20")), f"{name}: {said}"
        assert ("random weights" in said) == ("h200" in name), f"{name}: {said}"
