"""Pictures of reports. matplotlib is optional: `pip install lingbot-kernels[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MOST_BARS = 200  # beyond that, areas


def require() -> None:
    """Raise ImportError, saying what to install, where matplotlib isn't there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"matplotlib is not importable ({error}); install lingbot-kernels[plot]") from error


def latency_per_chunk(report: dict[str, Any], path: Path) -> None:
    """Draw a rollout's report as PNG: each chunk's denoise steps and context update stacked, and the steady median."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
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

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    figure.savefig(path, dpi=120)


def profile(report: dict[str, Any], path: Path) -> None:
    """Bars: time of each phase and of each op; the ops' TB/s beside theirs."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clock = "host_us" if report["gpu_idle_share"] is None else "gpu_us"
    groups = [(name, row[clock] / 1e3, "") for name, row in report["phases"].items()]
    ops = [
        (f"{row['op']}{' in ' + row['phase'] if row['phase'] else ''}", row[clock] / 1e3,
         "" if row["tbps"] is None else f" {row['tbps']:.3g} TB/s")
        for row in report["ops"]
    ]  # fmt: skip
    panels = [(title, bars) for title, bars in (("phases", groups), ("ops", ops)) if bars]
    figure = Figure(figsize=(6.5 * len(panels), 1.2 + 0.3 * max(len(bars) for _, bars in panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn = axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color="C0")
        axes.bar_label(drawn, [f"{value:.2f} ms{note}" for _, value, note in bars], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.set_title(f"{title}, milliseconds in all", fontsize=10)
    figure.suptitle(f"{report['what']}: {report['case']}, {report['dtype']}, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
