"""Where a denoise step's time goes: ours by kind of kernel, the bare floor and the peer, as stacked bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PHASES = (
    ("attention", "attention"),
    ("products", "matrix products"),
    ("fused_passes", "fused passes"),
    ("other", "other"),
    ("gaps", "gaps"),
)


def plot(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of one run's rows.

    Raises:
        ValueError: the rows have no timed denoise step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {(row["op"], row["backend"]): row for row in rows if row["p50_us"] is not None}
    ours, floor = timed.get(("denoise_step", "lingbot_kernels")), timed.get(("bare_floor", "library"))
    if ours is None or floor is None:
        raise ValueError("the rows have no timed denoise step and floor")
    figure, axes = pyplot.subplots(figsize=(9, 3.2))
    step = ours["p50_us"] / 1e3
    parts = {name: timed[(f"step_phase_{name}", "lingbot_kernels")]["p50_us"] / 1e3 for name, _ in PHASES}
    scale = step / sum(parts.values())  # kernels were timed under the profiler, which slows a step a little
    left = 0.0
    for (name, label), color in zip(PHASES, ("#3b6fb6", "#6fa8dc", "#e08e3c", "#999999", "#dddddd"), strict=True):
        axes.barh("lingbot-kernels", parts[name] * scale, left=left, color=color, label=label)
        left += parts[name] * scale
    axes.barh("bare floor", floor["p50_us"] / 1e3, color="#444444")
    peer = timed.get(("denoise_step", "flashdreams"))
    bars = [("lingbot-kernels", step), ("bare floor", floor["p50_us"] / 1e3)]
    if peer is not None:
        axes.barh("FlashDreams 0.1.0", peer["p50_us"] / 1e3, color="#b0b0b0")
        bars.append(("FlashDreams 0.1.0", peer["p50_us"] / 1e3))
    for name, milliseconds in bars:
        axes.annotate(
            f"{milliseconds:.1f} ms", (milliseconds, name), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.12 * max(ms for _, ms in bars))
    axes.set_xlabel("milliseconds of a denoise step")
    axes.set_title(f"{ours['case']} on {ours['gpu']}, {ours['date'][:10]}", fontsize=9)
    axes.legend(fontsize=8, loc="lower right", ncols=5, bbox_to_anchor=(1.0, -0.42))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
