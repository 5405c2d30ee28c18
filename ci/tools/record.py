"""Write into the notebooks what runs of them printed and drew, under each cell: `make record`.

A record is an executed notebook in records/. To put a new run in an old one's place:
python ci/tools/record.py --take build/notebook.ipynb --name h200 --commit ID --on "H200, random weights, Ray 2.60.0"
"""

import argparse
import ast
import base64
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS, RECORDS = ("notebook.ipynb", "beyond_chat.ipynb"), ROOT / "records"
# What the pages show of a run: the cell, and whose run it is. Random weights can't answer, and one GPU can't scale.
PARTS = {
    "check": "h200",
    "start-ray": "h200",
    "run-app": "h200",
    "curl": "stand-in",
    "run-client": "stand-in",
    "load": "h200",
    "draw-monitoring": "h200",
    "compare-kv": "h200",
    "draw-capacity": "stand-in",  # Computed, wherever it runs
    "sweep": "h200",
    "draw-sweep": "h200",
    "cost": "h200",
    "autoscale": "two-h200s",
    "serve-shutdown": "h200",
    "stop-ray": "h200",
    "chat-check": "beyond-chat",
    "chat-start": "beyond-chat",
    "deploy-tools": "beyond-chat",
    "ask-json": "beyond-chat",
    "json-stream": "beyond-chat",
    "json-cost": "beyond-chat",
    "tool-loop": "beyond-chat",
    "tool-choice": "beyond-chat",
    "tool-stream": "beyond-chat",
    "run-patient-client": "beyond-chat",
    "cancel": "beyond-chat",
    "quality-before": "beyond-chat",
    "deploy-fp8": "beyond-chat",
    "quality-after": "beyond-chat",
    "chat-shutdown": "beyond-chat",
    "chat-stop-ray": "beyond-chat",
}
FIGURES = {  # What a figure shows, for those who don't see it
    "draw-monitoring": "Six panels of metrics over time",
    "draw-capacity": "Requests that fit, by length and GPU",
    "draw-sweep": "Throughput and first token by concurrency",
    "autoscale": "Requests and replicas over time",
}
# What every later output depends on
TUTORIAL = ("serve-app", "start-ray")
BASIS = {"h200": TUTORIAL, "two-h200s": TUTORIAL, "stand-in": TUTORIAL, "beyond-chat": ("chat-start", "tools-app")}


def read_records() -> dict[str, nbformat.NotebookNode]:
    return {file.stem: nbformat.read(file, as_version=4) for file in RECORDS.glob("*.ipynb")}


def outputs(record: nbformat.NotebookNode, cell_id: str) -> tuple[str, bytes | None]:
    """The text that a cell printed to stdout, without colors, and the picture that it drew, if any."""
    cell = next((cell for cell in record.cells if cell.id == cell_id), None)
    if cell is None:
        raise SystemExit(f"No record has the cell {cell_id} yet. CONTRIBUTING.md says how to record")
    text = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
    pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return re.sub(r"\x1b\[[\d;]*m", "", text).strip("\n"), base64.b64decode(pictures[0]) if pictures else None


def folded(text: str) -> str:
    """`text` in lines of at most 110 characters, broken at a space or between the items of JSON."""
    lines = []
    for line in text.expandtabs().splitlines():
        while len(line) > 110:
            cut = max(line.rfind(" ", 0, 110), line.rfind(',"', 0, 110)) + 1 or 110
            lines.append(line[:cut].rstrip())
            line = line[cut:]
        lines.append(line)
    return "\n".join(lines)


def part(record: nbformat.NotebookNode, cell_id: str) -> str:
    """The Markdown of what a cell printed and drew. Writes the picture into images/."""
    text, picture = outputs(record, cell_id)
    said = [f"```text\n# {record.metadata.recorded}\n{folded(text)}\n```"] if text else []
    if picture:
        number = 2 + list(FIGURES).index(cell_id)  # Figure 1 is at the top of the page.
        file = f"images/{cell_id.removeprefix('draw-')}.png"
        (ROOT / file).write_bytes(picture)
        where = record.metadata.recorded.partition(", Ray ")[0]  # The rest stands in the picture.
        where = "Computed. The marks are from an H200's logs" if cell_id == "draw-capacity" else where
        said += [f"![{FIGURES[cell_id]}]({file})", f"*Figure {number}. {where}.*"]
    return "\n\n".join(said)


def with_parts(notebook: nbformat.NotebookNode) -> list:
    """The notebook's cells with each recorded part, made anew from the records, under its code cell."""
    records, cells = read_records(), []
    for cell in notebook.cells:
        if "recorded" in cell.metadata.get("tags", []):
            continue
        cells.append(cell)
        if cell.id in PARTS:
            text = part(records[PARTS[cell.id]], cell.id)
            cells.append(nbformat.v4.new_markdown_cell(text, id=f"{cell.id}-recorded", metadata={"tags": ["recorded"]}))
    return cells


def with_outputs(notebook: nbformat.NotebookNode) -> list:
    """The notebook's cells as executed, with the records' outputs in place of the recorded parts: for the docs page."""
    records, cells = read_records(), []
    for cell in [cell for cell in notebook.cells if "recorded" not in cell.metadata.get("tags", [])]:
        cells.append(cell)
        if cell.id in PARTS:
            record = records[PARTS[cell.id]]
            text, picture = outputs(record, cell.id)
            said = f"# {record.metadata.recorded}\n{folded(text)}"
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=said)]
            if picture:
                data = {"image/png": base64.b64encode(picture).decode()}
                cell.outputs.append(nbformat.v4.new_output("display_data", data))
                cell.metadata["mystnb"] = {"image": {"alt": FIGURES[cell.id]}}
    return cells


def code(source: str) -> str:
    """What a cell does: of Python its syntax tree, so that comments and line breaks don't count."""
    try:
        return ast.dump(ast.parse(source.removeprefix("%%writefile serve_llama_3_1_8b.py")))
    except SyntaxError:
        return source


def outdated(notebooks: list[nbformat.NotebookNode]) -> list[str]:
    """The cells whose recorded part is of other code than theirs, or of another app or launch."""
    cells = [cell for notebook in notebooks for cell in notebook.cells if cell.cell_type == "code"]
    now, old = {cell.id: code(cell.source) for cell in cells}, []
    for name, record in read_records().items():
        then = {cell.id: code(cell.source) for cell in record.cells if cell.cell_type == "code"}
        shown = [cell_id for cell_id, source in PARTS.items() if source == name]
        old += [cell_id for cell_id in shown if any(now[one] != then.get(one) for one in (cell_id, *BASIS[name]))]
    return old


def take(run: Path, name: str, on: str, commit: str) -> None:
    """Keep an executed notebook as records/<name>.ipynb. Raises SystemExit when a cell failed or wasn't executed."""
    record = nbformat.read(run, as_version=4)
    record.cells = [cell for cell in record.cells if cell.cell_type == "code"]
    for cell in record.cells:
        failed = any(output.output_type == "error" for output in cell.outputs)
        skipped = "skip-execution" not in cell.metadata.get("tags", []) and cell.execution_count is None
        if failed or skipped:
            raise SystemExit(f"{run}: cell {cell.id} {'failed' if failed else 'was not executed'}")
        cell.metadata = {"tags": cell.metadata.get("tags", [])}
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in [output for output in cell.outputs if output.output_type == "stream"]:
            output.text = re.sub(r"Model: /\S*/", "Model: ", output.text)  # Where it lay is nobody's business.
            output.text = re.sub(r"^INFO \d\d-\d\d .*\n", "", output.text, flags=re.M)  # vLLM's, of what isn't there
    date = record.metadata.papermill.start_time[:10]
    kept = {key: record.metadata[key] for key in ("kernelspec", "language_info")}
    record.metadata = {**kept, "recorded": f"{on}, {date}", "commit": commit}
    RECORDS.mkdir(exist_ok=True)
    nbformat.write(record, RECORDS / f"{name}.ipynb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="an executed notebook")
    parser.add_argument("--name", choices=BASIS, help="of the record")
    parser.add_argument("--on", help="machine, weights and versions")
    parser.add_argument("--commit", help="that was executed")
    args = parser.parse_args()
    if args.take:
        if not (args.name and args.on and args.commit):
            parser.error("--take needs --name, --on and --commit")
        if re.search(r"\d{4}-\d\d-\d\d", args.on):
            parser.error("--on needs no date: the run's own is added")
        take(args.take, args.name, args.on, args.commit)
    notebooks = {name: nbformat.read(ROOT / name, as_version=4) for name in NOTEBOOKS}
    for name, notebook in notebooks.items():
        notebook.cells = with_parts(notebook)
        nbformat.write(notebook, ROOT / name)
    if old := outdated(list(notebooks.values())):
        raise SystemExit(f"Recorded before their code changed: {', '.join(old)}")
