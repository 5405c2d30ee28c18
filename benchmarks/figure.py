"""Draw what sittings measured: throughput and first token of this app beside another server.

Usage: python -m benchmarks.figure  (writes Figure 1 of the page and the social preview from benchmarks/results)
"""

import textwrap
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
COLORS = ("black", "white"), ("tab:orange", "black")  # Of bars and numbers, different in grey, too


def rows_of(folder: Path) -> list[tuple[str, str, str, list[dict]]]:
    """For each point that both servers of a sitting have: its label, the other's name, setup, and steady states."""
    found = records.read(folder)
    if len(found) != 2:
        return []
    ours, theirs = sorted(found.values(), key=lambda record: "tutorial" not in record["server"])
    both, versions = (records.by_point(ours), records.by_point(theirs)), ours["versions"]
    setup = f"{ours['model']}, {ours['weights']} weights, {ours['hardware']}, Ray {versions['ray']}, "
    setup += f"vLLM {versions['vllm']}, {ours['date']}"
    lengths = {
        records.label(one["point"]): "{input_len} tokens in, {output_len} out".format(**one["point"])
        for one in ours["cells"]
    }
    name = NAMES.get(theirs["server"], theirs["server"])
    points = [point for point in both[0] if point in both[1]]
    return [
        (f"{point.removeprefix('chat, ')}, {lengths[point]}", name, setup, [one[point] for one in both])
        for point in points
    ]


def draw(folders: list[Path], yours: Path | None = None) -> plt.Figure:
    """Two bars for each sitting and point, with 95 % intervals in gray. Those of the folder `yours` are called so.

    Raises ValueError when no sitting has two servers.
    """
    rows = [(folder == yours, *row) for folder in folders for row in rows_of(folder)]
    if not rows:
        raise ValueError("A figure needs a sitting with two servers")
    figure, axes = plt.subplots(1, 2, figsize=(9, 1 + 0.8 * len(rows)), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for number, (*_, pair) in enumerate(rows):
            estimates = [records.estimate(cells, metric) for cells in pair]
            for y, one, (bar, ink) in zip((3 * number, 3 * number + 1), estimates, COLORS, strict=True):
                low, high = one.interval or (one.value, one.value)
                axis.barh(y, one.value, 0.8, color=bar)
                axis.plot([low, high], [y, y], "|-", color="gray")
                axis.text(0, y, f"  {one.value:,.0f}", va="center", color=ink)
        axis.locator_params("x", nbins=5)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    names = [name for _, _, other, *_ in rows for name in (NAMES["tutorial"], other)]
    for number, (own, point, *_) in enumerate(rows):
        axes[0].text(0, 3 * number - 0.6, f" {'Yours: ' * own}{point}", va="bottom", fontweight="bold")
    axes[0].set_yticks([3 * number + y for number in range(len(rows)) for y in (0, 1)], names)
    axes[0].set_ylim(3 * len(rows) - 1.2, -1.4)
    said = " | ".join(dict.fromkeys(setup for _, _, _, setup, _ in rows))
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
