"""Draw what sittings measured: throughput and first token of this app beside another server.

Usage: python -m benchmarks.figure  (writes Figure 1 of the page and the social preview from benchmarks/results)
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import StrMethodFormatter

from benchmarks import records

IMAGES = Path(__file__).parent.parent / "images"
PAGE, PREVIEW = IMAGES / "comparison.png", IMAGES / "social-preview.png"
DPI = 120
ON_PAGE = (
    "h200-default-path-32", "h200-default-path", "h200-vllm-serve",
    "h200-default-path-varied", "h200-varied-lengths", "h200-varied-lengths-256",
)  # fmt: skip
# Bars too short to compare; of one length, more requests than are worth their wait
NOT_ON_PAGE = ("1 concurrent", "256 concurrent")
NAMES = {"tutorial": "this app", "vllm-serve": "vllm serve", "default-path": "Ray Serve's defaults"}
PANELS = {"output_tok_s": "Output tokens per second", "ttft_p50_ms": "First token, ms (median)"}
COLORS = "black", "tab:orange"  # Different in grey, too


@dataclass
class Row:
    """What two servers of a sitting had at one point."""

    load: tuple[float, int]  # Requests per second and concurrency, of which one is 0: rows are in this order
    point: str
    lengths: str
    setup: str
    date: str
    names: list[str]
    pair: list[dict[int, records.Steady]]  # This app's, and the other's


def rows_of(folder: Path) -> list[Row]:
    """A row for each point that both servers of a sitting have. The tutorial, as it is or changed, comes first."""
    found = sorted(records.read(folder).values(), key=lambda one: ("tutorial" not in one["server"], len(one["server"])))
    if len(found) != 2:
        return []
    both, rows = [records.by_point(record) for record in found], {}
    names = [NAMES.get(record["server"], record["server"]) for record in found]
    setup = "{model}, {weights} weights, {hardware}, Ray {versions[ray]}, vLLM {versions[vllm]}".format(**found[0])
    for cell in found[0]["cells"]:
        point, label = cell["point"], records.label(cell["point"])
        if all(label in points for points in both):
            load = point.get("rate", 0), point.get("concurrency", 0)
            lengths = "{input_len} tokens in, {output_len} out".format(**point)
            varied = f" ±{point['range_ratio']:.0%}" if point["range_ratio"] else ""
            said = label.replace(varied, "", 1).removeprefix("chat, ") + (varied and f", lengths{varied}")
            pair = [points[label] for points in both]
            rows[label] = Row(load, said, lengths, setup, found[0]["date"], names, pair)
    return sorted(rows.values(), key=lambda row: row.load)


def rows_of_page() -> list[Row]:
    """The rows of Figure 1: points with enough repetitions, without those of NOT_ON_PAGE."""
    rows = [row for name in ON_PAGE for row in rows_of(records.RESULTS / name) if row.point not in NOT_ON_PAGE]
    rows = [row for row in rows if all(len(cells) >= records.CLAIM_REPETITIONS for cells in row.pair)]
    return sorted(rows, key=lambda row: row.load)


def draw(rows: list[Row], yours: Sequence[Row] = ()) -> plt.Figure:
    """Two bars for each row, with 95 % intervals in gray. Those of the reader, `yours`, come first and are called so.

    Raises ValueError when there is none: no sitting has two servers.
    """
    own, rows = len(yours), [*yours, *rows]
    if not rows:
        raise ValueError("A figure needs a sitting with two servers")
    figure, axes = plt.subplots(1, 2, figsize=(9, 1 + 0.8 * len(rows)), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for number, row in enumerate(rows):
            if metric == "output_tok_s" and row.load[0]:
                axis.text(0, 3 * number + 0.5, " set by the clients", va="center")
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
    names = [name for row in rows for name in row.names]
    axes[0].set_yticks([3 * number + y for number in range(len(rows)) for y in (0, 1)], names)
    axes[0].set_ylim(3 * len(rows) - 1.2, -1.4)
    said = [*dict.fromkeys(row.setup for row in rows), *(lengths if len(lengths) == 1 else ())]
    dates = sorted(row.date for row in rows)
    said = ", ".join([*said, " to ".join(dict.fromkeys([dates[0], dates[-1]]))])
    figure.supxlabel("\n".join(textwrap.wrap(f"{said}. Gray: 95 % intervals", 110)), fontsize="small")
    return figure


def preview() -> plt.Figure:
    """What a link to the repository shows: 1280 by 640 pixels, as GitHub asks, with nothing near the edges."""
    with plt.rc_context({"font.size": 13}):
        figure = draw([row for row in rows_of_page() if row.load == (0, 128)])
    figure.set_size_inches(1280 / DPI, 640 / DPI)
    figure.get_layout_engine().set(rect=(0.04, 0.04, 0.92, 0.84))
    figure.suptitle("Deploy Llama-3.1-8B with Ray Serve LLM", fontsize=24, fontweight="bold", y=0.95)
    return figure


def save(figure: plt.Figure, file: Path) -> None:
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    plt.close(figure)


def show(folder: Path) -> None:
    """Draw a sitting above those of the page, and print where the figure is."""
    if yours := rows_of(folder):
        save(draw(rows_of_page(), yours), folder / "comparison.png")
        print(f"\nBeside the records of the page: {folder / 'comparison.png'}")


if __name__ == "__main__":
    save(draw(rows_of_page()), PAGE)
    save(preview(), PREVIEW)
