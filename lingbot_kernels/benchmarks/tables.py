"""Reports as tables on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from lingbot_kernels.realtime.memory import GIB

MOST_ROWS = 40  # of chunks: a longer rollout shows its first and last ones; the JSON has all

_MOST_BLOCKS = 5  # the loudest, on the screen; the JSON has all

STORE_NAMES = {"rope": "rope", "time_embeddings": "time", "camera_modulation": "camera", "text": "text"}
PRECISION_NAMES = {
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int8_plain": "int8, not rotated",
    "fp8": "fp8, a scale a row",
    "int8_qk": "int8, Q and K too",
    "int8_fp8_attention": "int8, attention in fp8 (FA3)",
}


def bytes_text(count: float) -> str:
    """With a unit of 1000: 86.0 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def console() -> Console:
    """Standard output: as wide as the terminal, or as wide as the tables where it is none."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column == "in" else "right", no_wrap=True)
    return table


def _facts(*facts: tuple[str, str]) -> Table:
    """A name and what is to be said of it in a row."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(*fact)
    return table


def chunk_table(report: dict[str, Any]) -> Table:
    """One row per chunk: time to chunk, each denoise step, the context update; cache hits by store."""
    chunks = report["chunks"]
    stores = list(chunks[0]["cache_hits"])
    steps = len(chunks[0]["denoise_ms"])
    table = _table(
        "Milliseconds per chunk; cache hits in its forwards", "chunk", "to chunk",
        *(f"step {i}" for i in range(steps)), "context", "total", "visible",
        *(f"{STORE_NAMES.get(store, store)} hits" for store in stores),
    )  # fmt: skip
    half = MOST_ROWS // 2
    for chunk in chunks if len(chunks) <= MOST_ROWS else [*chunks[:half], None, *chunks[-half:]]:
        if chunk is None:
            table.add_row("...")
            continue
        times = (chunk["time_to_chunk_ms"], *chunk["denoise_ms"], chunk["context_ms"], chunk["total_ms"])
        hits = (f"{chunk['cache_hits'][s]}/{chunk['cache_hits'][s] + chunk['cache_misses'][s]}" for s in stores)
        table.add_row(str(chunk["index"]), *(f"{t:.1f}" for t in times), str(chunk["visible_tokens"]), *hits)
    return table


def print_rollout(console: Console, report: dict[str, Any]) -> None:
    """The table of chunks, then the summary."""
    model, settings, result = report["model"], report["settings"], report["summary"]
    console.print(chunk_table(report))
    console.print()
    facts = _facts()
    name = model["preset"] or model["checkpoint"]
    facts.add_row("model", f"{name}, {model['parameters']:,} parameters, {settings['dtype']}")
    facts.add_row("device", report["device"])
    size = f"{settings['height']}x{settings['width']} pixels"
    facts.add_row("video", f"{size}, {settings['tokens_per_chunk']} tokens per chunk")
    facts.add_row("first chunk", f"{result['first_chunk_ms']:.1f} ms to clean latents")
    steady, total = result["time_to_chunk_ms"]["p50"], result["total_ms"]["p50"]
    count = len(result["steady_chunks"])
    facts.add_row("steady chunk", f"{steady:.1f} ms to clean latents, {total:.1f} ms in all (medians of {count})")
    rate = f"{result['frames_per_second']:.1f} frames a second"
    facts.add_row("video rate", f"{rate} ({result['video_frames_per_chunk']} frames per chunk)")
    sizes = (f"{STORE_NAMES.get(key, key)} {bytes_text(value)}" for key, value in result["cache_bytes"].items())
    facts.add_row("caches", ", ".join(sizes))
    graphs = result["cuda_graphs"]
    if settings["cuda_graphs"]:
        facts.add_row("CUDA graphs", f"{graphs['captures']} captured, {graphs['replays']} forwards replayed")
    if result["camera_ms"] is not None:
        facts.add_row("camera", f"{result['camera_ms']['p50']:.1f} ms of step 0: its modulation, kept for the chunk")
    memory = result["memory"]
    if memory["weights_bytes"] is not None:
        planned = {STORE_NAMES.get(key, key): value for key, value in memory["planned"].items()}
        parts = ", ".join(f"{name} {bytes_text(value)}" for name, value in planned.items())
        facts.add_row("planned memory", f"{parts}, total {bytes_text(sum(planned.values()))}")
        phases = {"weights": "weights_bytes", "first chunk": "first_chunk_bytes", "steady chunk": "steady_chunk_bytes"}
        facts.add_row("memory", ", ".join(f"{name} {bytes_text(memory[key])}" for name, key in phases.items()))
    facts.add_row("peak memory", bytes_text(result["peak_memory_bytes"]))
    served: dict[str, list[str]] = {}
    for op, backend in result["backends"].items():
        served.setdefault(backend, []).append(op)
    for backend, names in served.items():
        facts.add_row(f"by {backend}", ", ".join(names))
    console.print(facts, highlight=False)


def print_doctor(console: Console, report: dict[str, Any]) -> None:
    """The environment, then each device's backends and what keeps the others from serving."""
    console.print(_facts(*_environment_rows(report["environment"])), highlight=False)
    for device, rows in report["ops"].items():
        console.print()
        table = _table(f"{device} tensors, {report['dtype']}", "op", "served by", "could serve too")
        table.columns[1].justify = table.columns[2].justify = "left"
        reasons: dict[tuple[str, str], list[str]] = {}
        for op, row in rows.items():
            able = [name for name, reason in row["others"].items() if reason is None]
            table.add_row(op, row["backend"] or "nothing", ", ".join(able))
            for name, reason in row["others"].items():
                if reason is not None:
                    reasons.setdefault((name, reason), []).append(op)
        console.print(table, highlight=False)
        for error in dict.fromkeys(row["error"] for row in rows.values() if row["error"]):
            console.print(f"error: {error}", highlight=False, soft_wrap=True)
        console.print("why not the others:", highlight=False)
        for (name, reason), ops in reasons.items():
            where = f"{len(ops)} ops" if len(ops) > 2 else ", ".join(ops)
            console.print(f"  {name} ({where}): {reason}", highlight=False, soft_wrap=True, markup=False)

    console.print()
    table = _table(
        "What networks take, GiB; sessions of 480x832", "network", "precision", "weights", "session", "in int8"
    )
    table.columns[1].justify = table.columns[4].justify = "left"
    for name, variants in report["networks"].items():
        for row in variants:
            names = [*row["int8_products"], *(("attention's Q and K",) if row["int8_attention"] else ())]
            products = ", ".join(names) + (f" but {', '.join(row['left_out'])}" if row["left_out"] else "")
            sizes = (f"{row[part] / 2**30:.1f}" for part in ("weights", "session"))
            table.add_row(name, row["precision"], *sizes, products)
    console.print(table, highlight=False)


def _environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    core = found["core"]
    cuda = found["torch_cuda"]
    gpus = [f"{gpu['name']} (sm {gpu['compute_capability']}, {bytes_text(gpu['bytes'])})" for gpu in found["gpus"]]
    if core is None:
        core_text = f"no: {found['core_missing']}"
    else:
        built = f"CUDA for {core['cuda_architectures']}" if core["cuda"] else "no CUDA"
        core_text = f"{core['version']}, {built}; CPU code for {core['cpu_isa']}"
    return [
        ("lingbot-kernels", found["lingbot_kernels"] + (f" at {found['commit']}" if found["commit"] else "")),
        ("python", f"{found['python']} on {found['platform']}"),
        ("cpu", f"{found['cpu']}, cores: {found['cpu_cores']}"),
        ("torch", f"{found['torch']}, {f'CUDA {cuda}' if cuda else 'no CUDA'}, threads: {found['torch_threads']}"),
        ("gpu", ", ".join(gpus) or "none"),
        ("driver", found["driver"] or "none"),
        ("cuDNN", found["cudnn"] or "none"),
        ("triton", found["triton"] or "not installed"),
        ("flash-attn-4", found["flash_attn_4"] or "not installed (extra fa4)"),
        ("fa3-fwd", found["fa3_fwd"] or "not installed (extra fa3)"),
        ("matplotlib", found["matplotlib"] or "not installed (extra plot)"),
        ("compiled core", core_text),
    ]


def print_caching(console: Console, report: dict[str, Any]) -> None:
    """A row for each switch: times without it, and what it saves."""
    table = _table(
        "Milliseconds, medians over steady chunks", "switched off", "chunk", "saved by it", "denoise step",
        "saved by it", "context", "saved by it", "kept", "same bits",
    )  # fmt: skip
    for row in report["rows"]:
        cells = []
        for name in ("total_ms", "denoise_step_ms", "context_ms"):
            cells.append(f"{row[name]['p50']:.2f}")
            saved = row["saved"].get(name)
            cells.append("" if saved is None else f"{saved['ms']:.2f} ({saved['share']:.1%})")
        kept = "" if row["cache_bytes"] is None else bytes_text(row["cache_bytes"])
        table.add_row(row["off"] or "nothing", *cells, kept, "yes" if row["bit_identical"] else "NO")
    console.print(table, highlight=False)
    settings = report["settings"]
    facts = (
        f"{report['device']}, {settings['dtype']}, {settings['tokens_per_chunk']} tokens per chunk; "
        f"{len(report['steady_chunks'])} steady chunks x {settings['repeats']} repeats"
    )
    console.print(facts, highlight=False, soft_wrap=True)


def print_profile(console: Console, report: dict[str, Any]) -> None:
    """Two tables and what is said in a line."""
    gpu = report["gpu_idle_share"] is not None
    times = ("host ms", "GPU ms", "launches") if gpu else ("ms",)

    def cells(row: dict[str, Any]) -> list[str]:
        host = f"{row['host_us'] / 1e3:.3f}"
        return [host, f"{row['gpu_us'] / 1e3:.3f}", str(row["launches"])] if gpu else [host]

    console.print(
        f"{report['what']}: {report['case']}, {report['dtype']}, {report['tokens']} tokens, {report['device']}"
    )
    if report["phases"]:
        table = _table("Phases (totals)", "phase", "calls", *times)
        for name, row in report["phases"].items():
            table.add_row(name, str(row["calls"]), *cells(row))
        console.print(table)
    table = _table("Ops (totals; bytes of a call)", "op", "in", "calls", *times, "us a call", "MB", "TB/s")
    for row in report["ops"]:
        call = (row["gpu_us"] if gpu else row["host_us"]) / row["calls"]
        rate = "-" if row["tbps"] is None else f"{row['tbps']:.3g}"
        table.add_row(
            row["op"], row["phase"] or "-", str(row["calls"]), *cells(row), f"{call:.1f}",
            f"{row['bytes'] / 1e6:.2f}", rate,
        )  # fmt: skip
    console.print(table)
    if report["launches_per_block"] is not None:
        each = report["launches_per_block"]
        console.print(
            f"launches per block: {each['all']:.1f}, of which {each['outside']:.1f} are neither products nor "
            f"attention, {each['own']:.1f} of these the library's own"
        )
    if gpu:
        console.print(f"GPU idle: {report['gpu_idle_share']:.1%} of the recorded time, launching every kernel")
    if report["gpu_idle_share_graphs"] is not None:
        console.print(f"GPU idle: {report['gpu_idle_share_graphs']:.1%} replaying CUDA graphs")


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
            PRECISION_NAMES.get(precision, precision), f"{values[0]:.1f}", f"{values[len(values) // 2]:.1f}",
            f"{found['psnr_db'][-1]:.1f}", f"{found['error']:.2%}", "" if own is None else f"{own['psnr_db'][-1]:.1f}",
        )  # fmt: skip
    console.print(table)
    loudest = sorted(report["by_block"].items(), key=lambda item: -item[1])[:_MOST_BLOCKS]
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
