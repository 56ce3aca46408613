"""The growth section of benchmarks/gpu.py as a table and a plot against memory's roofline.

    python benchmarks/gpu.py --sections ceilings,growth | tail -1 > report.json
    python benchmarks/gpu_plot.py report.json docs/gpu_growth.svg     # needs matplotlib

A step reads the weights once and each sequence's keys and values: bytes over the copied bytes a
second are its least time.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from roofline.budget import kv_token_bytes
from roofline.config import PRESETS


def main() -> None:
    """Print the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("plot", type=Path)
    asked = parser.parse_args()
    report = json.loads(asked.report.read_text().splitlines()[-1])
    weights = report["engine"]["int8"]["gb_per_token"] * 1e9
    token = kv_token_bytes(PRESETS[report["model"]], "bfloat16")
    copied = report["ceilings"]["copy_tb_s"] * 1e12
    cells: dict[int, dict[int, tuple[float, float]]] = {}
    for name, rate in report["growth"].items():
        batch, context = map(int, re.findall(r"\d+", name))
        most = batch * copied / (weights + batch * context * token)
        cells.setdefault(context, {})[batch] = rate, rate / most
    batches = sorted({batch for row in cells.values() for batch in row})
    print("| context | " + " | ".join(f"batch {batch}" for batch in batches) + " |")
    print("|---|" + "---|" * len(batches))
    for context, row in sorted(cells.items()):
        shown = [f"{row[b][0]:,.0f} ({row[b][1]:.0%})" if b in row else "" for b in batches]
        print(f"| {context:,} | " + " | ".join(shown) + " |")
    draw(asked.plot, cells, report["gpu"])


def draw(file: Path, cells: dict[int, dict[int, tuple[float, float]]], card: str) -> None:
    """Rates against batch, a line a context, dashed where memory alone would be."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for context, row in sorted(cells.items()):
        batches = sorted(row)
        (line,) = axes.plot(batches, [row[b][0] for b in batches], marker="o", label=f"{context:,}")
        roof = [row[b][0] / row[b][1] for b in batches]
        axes.plot(batches, roof, linestyle="--", color=line.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="decoded tokens/s")
    axes.set_xticks(sorted({b for row in cells.values() for b in row}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.set_title(f"Llama-3.1-8B INT8 on an {card}; dashed: memory's roofline")
    axes.legend(title="context")
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
