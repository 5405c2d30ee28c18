"""Draw what sittings measured: throughput and first token of this app beside another server.

Usage: python -m benchmarks.figure  (writes Figure 1 of the page and the social preview from benchmarks/results)
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import StrMethodFormatter

from benchmarks import records

IMAGES = Path(__file__).parent.parent / "images"
PAGE, PREVIEW = IMAGES / "comparison.png", IMAGES / "social-preview.png"
DPI = 120
ON_PAGE = ("h200-default-path", "h200-vllm-serve")
NAMES = {"tutorial": "this app", "vllm-serve": "vllm serve", "default-path": "Ray Serve's default path"}
PANELS = {"output_tok_s": "Output tokens per second", "ttft_p50_ms": "First token, ms (median)"}
COLORS = "black", "tab:orange"  # Different in grey, too
SATURATED = (0, 256)  # Left out of the page's: requests wait there, and how long is chance


@dataclass
class Row:
    """What two servers of a sitting had at one point."""

    load: tuple[float, int]  # Requests per second and concurrency, of which one is 0: rows are in this order
    point: str
    lengths: str
    setup: str
    date: str
    other: str
    pair: list[dict[int, records.Steady]]  # This app's, and the other's


def rows_of(folder: Path) -> list[Row]:
    """A row for each point that both servers of a sitting have."""
    found = records.read(folder)
    if len(found) != 2:
        return []
    ours, theirs = sorted(found.values(), key=lambda record: "tutorial" not in record["server"])
    both, rows = (records.by_point(ours), records.by_point(theirs)), {}
    setup = "{model}, {weights} weights, {hardware}, Ray {versions[ray]}, vLLM {versions[vllm]}".format(**ours)
    for cell in ours["cells"]:
        point, label = cell["point"], records.label(cell["point"])
        if all(label in points for points in both):
            load = point.get("rate", 0), point.get("concurrency", 0)
            lengths = "{input_len} tokens in, {output_len} out".format(**point)
            name, other = label.removeprefix("chat, "), NAMES.get(theirs["server"], theirs["server"])
            rows[label] = Row(load, name, lengths, setup, ours["date"], other, [points[label] for points in both])
    return list(rows.values())


def draw(folders: list[Path], yours: Path | None = None) -> plt.Figure:
    """Two bars for each sitting and point, with 95 % intervals in gray. Those of the folder `yours` are called so.

    Raises ValueError when no sitting has two servers.
    """
    rows = [row for folder in folders if folder != yours for row in rows_of(folder) if row.load != SATURATED]
    rows = sorted(rows, key=lambda row: row.load)
    if yours:
        rows = sorted(rows_of(yours), key=lambda row: row.load) + rows
    own = len(rows_of(yours)) if yours else 0
    if not rows:
        raise ValueError("A figure needs a sitting with two servers")
    figure, axes = plt.subplots(1, 2, figsize=(9, 1 + 0.8 * len(rows)), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for number, row in enumerate(rows):
            if metric == "output_tok_s" and row.load[0]:
                axis.text(0, 3 * number + 0.5, " as many as clients ask for", va="center")
                continue
            for y, cells, color in zip((3 * number, 3 * number + 1), row.pair, COLORS, strict=True):
                one = records.estimate(cells, metric)
                low, high = one.interval or (one.value, one.value)
                axis.barh(y, one.value, 0.8, color=color)
                axis.plot([low, high], [y, y], "|-", color="gray")
                axis.text(max(one.value, high), y, f"  {one.value:,.0f}", va="center")
        axis.locator_params("x", nbins=5)
        axis.margins(x=0.15)  # Room for the numbers
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    lengths = {row.lengths for row in rows}
    for number, row in enumerate(rows):
        point = f" {'Yours: ' * (number < own)}{row.point}{', ' + row.lengths if len(lengths) > 1 else ''}"
        axes[0].text(0, 3 * number - 0.6, point, va="bottom", fontweight="bold")
    names = [name for row in rows for name in (NAMES["tutorial"], row.other)]
    axes[0].set_yticks([3 * number + y for number in range(len(rows)) for y in (0, 1)], names)
    axes[0].set_ylim(3 * len(rows) - 1.2, -1.4)
    said = [*dict.fromkeys(row.setup for row in rows), *(lengths if len(lengths) == 1 else ())]
    said = ", ".join([*said, " and ".join(sorted({row.date for row in rows}))])
    figure.supxlabel("\n".join(textwrap.wrap(f"{said}. Gray: 95 % intervals", 110)), fontsize="small")
    return figure


def preview() -> plt.Figure:
    """What a link to the repository shows: 1280 by 640 pixels, as GitHub asks, with nothing near the edges."""
    figure = draw([records.RESULTS / name for name in ON_PAGE])
    figure.set_size_inches(1280 / DPI, 640 / DPI)
    figure.get_layout_engine().set(rect=(0.04, 0.04, 0.92, 0.84))
    figure.suptitle("Deploy Llama-3.1-8B with Ray Serve LLM", fontsize=24, fontweight="bold", y=0.95)
    return figure


def save(figure: plt.Figure, file: Path) -> None:
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def show(folder: Path) -> None:
    """Draw a sitting above those of the page, and print where the figure is."""
    if rows_of(folder):
        save(draw([folder, *(records.RESULTS / name for name in ON_PAGE)], folder), folder / "comparison.png")
        print(f"\nBeside the records of the page: {folder / 'comparison.png'}")


if __name__ == "__main__":
    save(draw([records.RESULTS / name for name in ON_PAGE]), PAGE)
    save(preview(), PREVIEW)
