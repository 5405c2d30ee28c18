"""Print what a sitting measured, beside the records in benchmarks/results."""

from pathlib import Path

from benchmarks import records

TITLES = {  # And digits after the point
    "output_tok_s": ("output tok/s", 0),
    "goodput_server_req_s": ("requests/s in 2 s and 100 ms", 1),
    "goodput_interactive_req_s": ("requests/s in 500 ms and 30 ms", 1),
    "ttft_p50_ms": ("TTFT p50, ms", 1),
    "ttft_p99_ms": ("TTFT p99, ms", 1),
    "tpot_p50_ms": ("TPOT p50, ms", 2),
    "tpot_p99_ms": ("TPOT p99, ms", 2),
}


def text(estimate: records.Estimate, digits: int) -> str:
    """An estimate and its interval, with a star when it is a ratio that may be claimed."""
    if estimate.interval is None:
        return f"{estimate.value:,.{digits}f}"
    low, high = estimate.interval
    return f"{estimate.value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def rows(measured: dict[str, dict], point: str) -> list[list[str]]:
    """The table of one point: a row of titles, then one for each metric. `measured` has by_point of each server."""
    names = [name for name in measured if point in measured[name]]
    recorded = [name for name in names if point in records.published(name)]
    counts = [f"{name}, n={records.counted(list(measured[name][point].values()))}" for name in names]
    pair = len(names) == 2
    table = [[point, *counts, *["ratio"] * pair, *(f"record of {name}" for name in recorded)]]
    for metric, (title, digits) in TITLES.items():
        row = [title] + [text(records.estimate(measured[name][point], metric), digits) for name in names]
        if pair:
            compared = records.ratio(*(measured[name][point] for name in names), metric)
            row.append(text(compared, 2) + " *" * compared.claimed)
        row += [text(records.estimate(records.published(name)[point], metric), digits) for name in recorded]
        table.append(row)
    return table


def show(folder: Path) -> None:
    """Print a table for each point. Raises SystemExit when the folder has no records."""
    found = records.read(folder)
    measured = {name: records.by_point(found[name]) for name in sorted(found, key=lambda n: ("tutorial" not in n, n))}
    if not measured:
        raise SystemExit(f"No records in {folder}")
    print(f"\n{folder.name}: in brackets 95 % intervals. * marks a ratio that may be claimed (first server / second).")
    for point in dict.fromkeys(point for points in measured.values() for point in points):
        table = rows(measured, point)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print()
        for row in table:
            print("   ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip())
