"""Read the records in benchmarks/results. Metrics have the names and units of `vllm bench serve`."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def record(variant: str) -> dict:
    """The record of a variant: an H200, 512 tokens in and 128 out."""
    return json.loads((RESULTS / f"h200-chat-{variant}.json").read_text())


def values(variant: str, concurrency: int, metric: str) -> list[float]:
    """A metric in each repetition that has this concurrency, sorted. Raises ValueError when there is none."""
    cells = [run["concurrency"].get(str(concurrency)) for run in record(variant)["runs"]]
    if not any(cells):
        raise ValueError(f"The record of {variant} has no run at concurrency {concurrency}")
    return sorted(cell[metric] for cell in cells if cell)
