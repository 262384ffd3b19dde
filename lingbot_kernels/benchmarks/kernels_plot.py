"""The bench's rows as a picture: what the prologue costs in each way, and every op against a copy of its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingbot_kernels.benchmarks.kernel_cases import HEADLINE
from lingbot_kernels.benchmarks.rows import GREEN, latest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL, WRITE = "qk_norm_rope_kv_write", "k_norm_rope_kv_write"
_COLORS = {"cuda": "#2563a8", "triton": "#5aa9d6", "cpu": "#2563a8"}
_PEER, _PLAIN, _CEILING = "#b9b4ab", "#dcd8d0", "#c2410c"
_LABELS = {
    "cuda": "this library, CUDA C++", "triton": "this library, Triton", "cpu": "this library, CPU",
    "reference": "plain torch (reference)", "eager-official": "official, eager (float64 complex)",
    "eager-float32": "eager, float32", "torch-compile": "torch.compile, float32",
    "flashinfer": "FlashInfer, 5 launches", "flashinfer-fused": "FlashInfer fused (no cache write)",
}  # fmt: skip


def headline_case(rows: Sequence[dict[str, Any]]) -> str:
    """The case that the picture is of: the 14B chunk where it was measured, else the one with the most bytes."""
    cases = {row["case"]: row["bytes"] for row in rows if row["op"] == FULL}
    if HEADLINE in cases:
        return HEADLINE
    return max(cases, key=lambda name: cases[name], default="")


def plot(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the picture of the green rows of one GPU to `path`, a PNG.

    Raises:
        ValueError: there is no green row to draw, or rows are of several GPUs.
        ImportError: matplotlib is not installed.
    """
    green = [row for row in latest(rows) if row["gate"] == GREEN and row["p50_us"]]
    gpus = sorted({row["gpu"] for row in green})
    if len(gpus) > 1:
        raise ValueError(f"rows of several GPUs ({', '.join(gpus)}): a picture is of one")
    case = headline_case(green)
    here = [row for row in green if row["case"].startswith(case) and not row["case"].endswith("-wrap")]
    if not case or not here:
        raise ValueError(f"no green row of {FULL} to draw")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, 3, figsize=(16, 5), layout="constrained", gridspec_kw={"width_ratios": [1.1, 0.9, 1.15]}
    )
    _draw_op(axes[0], here, FULL, "norm + RoPE + K/V write")
    _draw_op(axes[1], here, WRITE, "the same, write-only (context update)")
    _draw_ratios(axes[2], here)
    newest = max((row for row in here if row["op"] == FULL), key=lambda row: row.get("date", ""))
    figure.suptitle(
        f"{gpus[0]} · {case} · {newest['dtype']} · torch {newest['torch']} · {newest.get('date', '')[:10]}"
        f" · commit {newest['commit']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_op(axes: Axes, rows: Sequence[dict[str, Any]], op: str, title: str) -> None:
    """Bars of an op's times, fastest first, with the copy's time as a line."""
    bars = sorted((row for row in rows if row["op"] == op), key=lambda row: row["p50_us"])
    axes.set_title(title, fontsize=11)
    if not bars:
        axes.set_axis_off()
        return
    colors = [_COLORS.get(row["backend"], _PEER if row["peer"] else _PLAIN) for row in bars]
    times = [row["p50_us"] for row in bars]
    places = list(range(len(bars)))
    axes.barh(places, times, color=colors)
    axes.set_yticks(places, [_LABELS.get(row["backend"], row["backend"]) for row in bars], fontsize=8)
    for place, row in zip(places, bars, strict=True):
        axes.text(row["p50_us"] + 0.012 * max(times), place, f"{row['p50_us']:.0f} us", va="center", fontsize=8)
    ceiling = bars[0]["ceiling_us"]
    axes.axvline(ceiling, color=_CEILING, linewidth=1.2)
    axes.annotate(
        f"copy of the same bytes, {ceiling:.0f} us", (ceiling, 1), xycoords=("data", "axes fraction"),
        xytext=(4, -10), textcoords="offset points", color=_CEILING, fontsize=8,
    )  # fmt: skip
    axes.set_xlim(0, max(ceiling, *times) * 1.2)
    axes.set_ylim(len(bars) - 0.5, -1.0)
    axes.set_xlabel("median time, microseconds", fontsize=8)
    _tidy(axes)


def _draw_ratios(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Every op's time over its copy's, our backends side by side."""
    ours = [row for row in rows if row["backend"] in _COLORS and row["ratio"] and row["ceiling"] == "copy"]
    names = list(dict.fromkeys((row["op"], row["case"]) for row in ours))
    backends = [name for name in _COLORS if any(row["backend"] == name for row in ours)]
    height = 0.8 / max(len(backends), 1)
    largest = max((row["ratio"] for row in ours), default=1.0)
    limit = max(1.25, min(largest, 3.0) * 1.12)  # a longer bar is cut, its number stands
    for index, backend in enumerate(backends):
        found = {(row["op"], row["case"]): row["ratio"] for row in ours if row["backend"] == backend}
        places = [i + (index - (len(backends) - 1) / 2) * height for i, name in enumerate(names) if name in found]
        values = [found[name] for name in names if name in found]
        axes.barh(places, values, height=height * 0.92, color=_COLORS[backend], label=_LABELS[backend])
        for place, value in zip(places, values, strict=True):
            cut = value > 0.93 * limit
            axes.text(
                0.99 * limit if cut else value + 0.01 * limit, place, f"{value:.2f}", fontsize=6.5, va="center",
                ha="right" if cut else "left", color="white" if cut else "black",
            )  # fmt: skip
    axes.axvline(1, color=_CEILING, linewidth=1.2)
    case = headline_case(rows)
    labels = [op + name.removeprefix(case).replace("-r32", ", f32 residual").replace("-camera", ", camera")
              for op, name in names]  # fmt: skip
    axes.set_yticks(range(len(names)), labels, fontsize=7.5)
    axes.set_title("every pass over a copy of its bytes", fontsize=11)
    axes.set_xlabel("median time / copy's", fontsize=8)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(names) + 0.8, -0.6)
    axes.legend(fontsize=7, loc="lower right", ncols=2, frameon=False)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e5e2dc", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
