"""A quality report as one screen of text, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lingbot_kernels.benchmarks import plots
from lingbot_kernels.realtime.memory import GIB

NAMES = {
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int8_plain": "int8, not rotated",
    "fp8": "fp8, a scale a row",
    "int8_qk": "int8, Q and K too",
    "int8_fp8_attention": "int8, attention in fp8 (FA3)",
}
MOST_BLOCKS = 5  # the loudest, on the screen; the JSON has all


def print_quality(console: Console, report: dict[str, Any]) -> None:
    """Precisions, what each product and the loudest blocks cost, memory and time, and the verdict."""
    settings, model = report["settings"], report["model"]
    name = model["preset"] or model["checkpoint"]
    console.print(
        f"{name}, {model['weights']} weights, {model['config']['num_layers']} blocks, {settings['chunks']} chunks of "
        f"{settings['tokens_per_chunk']} tokens, {report['device']}",
        highlight=False,
    )
    table = _table("PSNR against float32, dB", "precision", "worst", "median", "last", "error", "last, on its own")
    for precision, found in report["teacher_forced"].items():
        values = sorted(found["psnr_db"])
        own = report["free_rollout"].get(precision)
        table.add_row(
            NAMES.get(precision, precision), f"{values[0]:.1f}", f"{values[len(values) // 2]:.1f}",
            f"{found['psnr_db'][-1]:.1f}", f"{found['error']:.2%}", "" if own is None else f"{own['psnr_db'][-1]:.1f}",
        )  # fmt: skip
    console.print(table)
    loudest = sorted(report["by_block"].items(), key=lambda item: -item[1])[:MOST_BLOCKS]
    for title, rows in (("Error alone", report["by_product"].items()), ("Loudest blocks", loudest)):
        console.print(f"{title}: " + ", ".join(f"{name} {error:.2%}" for name, error in rows), highlight=False)
    memory = report["memory"]
    each = (f"{name} {(x['weights'] + x['session']) / GIB:.2f}" for name, x in memory.items())
    console.print("GiB of weights and session: " + ", ".join(each), highlight=False)
    if report["step_ms"]:
        step = dict(report["step_ms"])
        plain = step.pop("bfloat16")
        others = (f", {name} {ms:.1f} ms ({ms / plain:.2f} x)" for name, ms in step.items())
        console.print(f"Denoise step: bfloat16 {plain:.1f} ms{''.join(others)}", highlight=False)
    console.print(report["verdict"], style="bold", highlight=False)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def plot(report: dict[str, Any], path: Path) -> None:
    """PNG: PSNR per chunk of every precision, dashed where it goes on from its own chunks; each product's error."""
    plots.require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for i, (precision, found) in enumerate(report["teacher_forced"].items()):
        left.plot(found["psnr_db"], color=f"C{i}", marker="o", markersize=3, label=NAMES.get(precision, precision))
        own = report["free_rollout"].get(precision)
        if own is not None:
            left.plot(own["psnr_db"], color=f"C{i}", linestyle="--", linewidth=1)
    left.set_xlabel("chunk (dashed: after its own chunks)")
    left.set_ylabel("PSNR against float32, dB")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, fontsize=8)
    errors = report["by_product"]
    bars = right.barh(list(errors), [100 * value for value in errors.values()], color="C1")
    right.bar_label(bars, [f"{value:.2%}" for value in errors.values()], padding=3, fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.25)
    right.set_xlabel("error of a forward with it alone in int8, %")
    model = report["model"]
    figure.suptitle(
        f"{model['preset'] or model['checkpoint']}, {model['weights']} weights, {report['device']}", fontsize=10
    )
    figure.savefig(path, dpi=120)
