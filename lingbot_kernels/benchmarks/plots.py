"""Pictures of reports and of rows. matplotlib is optional: `pip install lingbot-kernels[plot]`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingbot_kernels.benchmarks.kernel_cases import HEADLINE
from lingbot_kernels.benchmarks.rows import GREEN, OURS, latest
from lingbot_kernels.benchmarks.tables import PRECISION_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 200  # beyond that, areas
FULL, WRITE = "qk_norm_rope_kv_write", "k_norm_rope_kv_write"
_COLORS = {"cuda": "#2563a8", "triton": "#5aa9d6", "cpu": "#2563a8"}
_PEER, _PLAIN, _CEILING = "#b9b4ab", "#dcd8d0", "#c2410c"
_LABELS = {
    "cuda": "this library, CUDA C++", "triton": "this library, Triton", "cpu": "this library, CPU",
    "reference": "plain torch (reference)", "eager-official": "official, eager (float64 complex)",
    "eager-float32": "eager, float32", "torch-compile": "torch.compile, float32",
    "flashinfer": "FlashInfer, 5 launches", "flashinfer-fused": "FlashInfer fused (no cache write)",
}  # fmt: skip
_PHASES = {  # of kernels: a label and a colour
    "attention": ("attention", "#3b6fb6"), "products": ("matrix products", "#6fa8dc"),
    "fused_passes": ("fused passes", "#e08e3c"), "other": ("other", "#999999"), "gaps": ("gaps", "#dddddd"),
}  # fmt: skip


def require() -> None:
    """Raise ImportError, saying what to install, where matplotlib isn't there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"matplotlib is not importable ({error}); install lingbot-kernels[plot]") from error


@contextlib.contextmanager
def picture(
    path: Path, size: tuple[float, float], widths: Sequence[float] = (1,), layout: Any = "constrained", **saved: Any
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure and its panels in a row, `widths` beside each other; after the block it is saved as PNG."""
    require()
    path.parent.mkdir(parents=True, exist_ok=True)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    yield figure, figure.subplots(1, len(widths), squeeze=False, width_ratios=list(widths))[0]
    figure.savefig(path, **{"dpi": 120, **saved})


def latency_per_chunk(report: dict[str, Any], path: Path) -> None:
    """Draw a rollout's report as PNG: each chunk's denoise steps and context update stacked, and the steady median."""
    require()
    from matplotlib.ticker import MaxNLocator

    chunks = report["chunks"]
    index = [chunk["index"] for chunk in chunks]
    steps = len(chunks[0]["denoise_ms"])
    parts = {f"denoise step {i}": [chunk["denoise_ms"][i] for chunk in chunks] for i in range(steps)}
    parts["context update"] = [chunk["context_ms"] for chunk in chunks]
    known = [sum(values) for values in zip(*parts.values(), strict=True)]
    parts["inputs and sampler"] = [chunk["total_ms"] - sum_ for chunk, sum_ in zip(chunks, known, strict=True)]
    colors = ["C0"] * steps + ["C1", "0.7"]
    shades = [0.95 - 0.55 * i / max(steps, 1) for i in range(steps)] + [1.0, 1.0]
    with picture(path, (9, 4.5)) as (_, (axes,)):
        base = [0.0] * len(chunks)
        for (label, values), color, shade in zip(parts.items(), colors, shades, strict=True):
            top = [b + v for b, v in zip(base, values, strict=True)]
            if len(chunks) <= _MOST_BARS:
                axes.bar(index, values, bottom=base, width=0.8, color=color, alpha=shade, label=label)
            else:
                axes.fill_between(index, base, top, color=color, alpha=shade, linewidth=0, label=label)
            base = top
        median = report["summary"]["total_ms"]["p50"]
        axes.axhline(median, color="black", linewidth=1, linestyle="--", label=f"steady median {median:.1f} ms")
        model, settings = report["model"], report["settings"]
        name = model["preset"] or Path(model["checkpoint"]).name
        axes.set_title(f"{name}, {settings['dtype']}, {settings['height']}x{settings['width']}, {report['device']}")
        axes.set_xlabel(f"chunk ({report['summary']['video_frames_per_chunk']} video frames each)")
        axes.set_ylabel("milliseconds")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def profile(report: dict[str, Any], path: Path) -> None:
    """Bars: time of each phase and of each op; the ops' TB/s beside theirs."""
    clock = "host_us" if report["gpu_idle_share"] is None else "gpu_us"
    groups = [(name, row[clock] / 1e3, "") for name, row in report["phases"].items()]
    ops = [
        (f"{row['op']}{' in ' + row['phase'] if row['phase'] else ''}", row[clock] / 1e3,
         "" if row["tbps"] is None else f" {row['tbps']:.3g} TB/s")
        for row in report["ops"]
    ]  # fmt: skip
    shown = [(title, bars) for title, bars in (("phases", groups), ("ops", ops)) if bars]
    size = (6.5 * len(shown), 1.2 + 0.3 * max(len(bars) for _, bars in shown))
    with picture(path, size, [1] * len(shown)) as (figure, panels):
        for axes, (title, bars) in zip(panels, shown, strict=True):
            drawn = axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color="C0")
            axes.bar_label(drawn, [f"{value:.2f} ms{note}" for _, value, note in bars], padding=3, fontsize=8)
            axes.invert_yaxis()
            axes.margins(x=0.35)
            axes.set_title(f"{title}, milliseconds in all", fontsize=10)
        figure.suptitle(f"{report['what']}: {report['case']}, {report['dtype']}, {report['device']}", fontsize=10)


def quality(report: dict[str, Any], path: Path) -> None:
    """PNG: PSNR per chunk of every precision, dashed where it goes on from its own chunks; each product's error."""
    require()
    from matplotlib.ticker import MaxNLocator

    model, errors = report["model"], report["by_product"]
    with picture(path, (11, 4.2), (2, 1)) as (figure, (left, right)):
        for i, (precision, found) in enumerate(report["teacher_forced"].items()):
            label = PRECISION_NAMES.get(precision, precision)
            left.plot(found["psnr_db"], color=f"C{i}", marker="o", markersize=3, label=label)
            own = report["free_rollout"].get(precision)
            if own is not None:
                left.plot(own["psnr_db"], color=f"C{i}", linestyle="--", linewidth=1)
        left.set_xlabel("chunk (dashed: after its own chunks)")
        left.set_ylabel("PSNR against float32, dB")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(frameon=False, fontsize=8)
        bars = right.barh(list(errors), [100 * value for value in errors.values()], color="C1")
        right.bar_label(bars, [f"{value:.2%}" for value in errors.values()], padding=3, fontsize=8)
        right.invert_yaxis()
        right.margins(x=0.25)
        right.set_xlabel("error of a forward with it alone in int8, %")
        name = model["preset"] or model["checkpoint"]
        figure.suptitle(f"{name}, {model['weights']} weights, {report['device']}", fontsize=10)


def model_step(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of one run's rows.

    Raises:
        ValueError: the rows have no timed denoise step.
    """
    timed = {(row["op"], row["backend"]): row for row in rows if row["p50_us"] is not None}
    ours, floor = timed.get(("denoise_step", OURS)), timed.get(("bare_floor", "library"))
    if ours is None or floor is None:
        raise ValueError("the rows have no timed denoise step and floor")
    parts = {name: timed[(f"step_phase_{name}", OURS)]["p50_us"] for name in _PHASES}
    scale = ours["p50_us"] / 1e3 / sum(parts.values())  # the profiler, which timed kernels, slows a step a little
    bars = [("lingbot-kernels", ours, ""), ("bare floor", floor, "#444444")]
    if (peer := timed.get(("denoise_step", "flashdreams"))) is not None:
        bars.append(("FlashDreams 0.1.0", peer, "#b0b0b0"))
    with picture(path, (9, 3.2), layout=None, dpi=150, bbox_inches="tight") as (_, (axes,)):
        left = 0.0
        for name, (label, color) in _PHASES.items():
            axes.barh("lingbot-kernels", parts[name] * scale, left=left, color=color, label=label)
            left += parts[name] * scale
        for name, row, color in bars:
            step = row["p50_us"] / 1e3
            if color:
                axes.barh(name, step, color=color)
            axes.annotate(f"{step:.1f} ms", (step, name), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.12 * max(row["p50_us"] / 1e3 for _, row, _ in bars))
        axes.set_xlabel("milliseconds of a denoise step")
        axes.set_title(f"{ours['case']} on {ours['gpu']}, {ours['date'][:10]}", fontsize=9)
        axes.legend(fontsize=8, loc="lower right", ncols=5, bbox_to_anchor=(1.0, -0.42))


def headline_case(rows: Sequence[dict[str, Any]]) -> str:
    """The case that the picture is of: the 14B chunk where it was measured, else the one with the most bytes."""
    cases = {row["case"]: row["bytes"] for row in rows if row["op"] == FULL}
    if HEADLINE in cases:
        return HEADLINE
    return max(cases, key=lambda name: cases[name], default="")


def kernels(rows: Iterable[dict[str, Any]], path: Path) -> None:
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

    newest = max((row for row in here if row["op"] == FULL), key=lambda row: row.get("date", ""))
    where = f"{gpus[0]} · {case} · {newest['dtype']} · torch {newest['torch']} · {newest.get('date', '')[:10]}"
    with picture(path, (16, 5), (1.1, 0.9, 1.15)) as (figure, axes):
        _draw_op(axes[0], here, FULL, "norm + RoPE + K/V write")
        _draw_op(axes[1], here, WRITE, "the same, write-only (context update)")
        _draw_ratios(axes[2], here)
        figure.suptitle(f"{where} · commit {newest['commit']}", fontsize=10)


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
