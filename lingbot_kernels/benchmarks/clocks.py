"""Clock and power of a GPU while something runs on it: what a difference between two products of one shape may be."""

from __future__ import annotations

import statistics
import subprocess

import torch

_QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits")
_FIELDS = ("sm_mhz", "watts", "celsius")
_PERIOD_MS = 50


class ClockSampler:
    """Samples nvidia-smi while the block runs; `medians` then holds sm_mhz, watts, celsius and samples, or nothing
    where there is no nvidia-smi or it said nothing.
    """

    def __init__(self, device: torch.device) -> None:
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        self._command = [*_QUERY, f"--loop-ms={_PERIOD_MS}", *([] if uuid is None else [f"--id=GPU-{uuid}"])]
        self._process: subprocess.Popen[str] | None = None
        self.medians: dict[str, float] = {}

    def __enter__(self) -> ClockSampler:
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._process = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        self.medians = medians(self._process.communicate()[0])


def medians(output: str) -> dict[str, float]:
    """Of the lines `clock, power, temperature` of nvidia-smi; lines that are no numbers are left out."""
    samples = []
    for line in output.splitlines():
        try:
            values = [float(part) for part in line.split(",")]
        except ValueError:
            continue
        if len(values) == len(_FIELDS):
            samples.append(values)
    if not samples:
        return {}
    columns = zip(*samples, strict=True)
    found = {name: statistics.median(column) for name, column in zip(_FIELDS, columns, strict=True)}
    return {**found, "samples": float(len(samples))}
