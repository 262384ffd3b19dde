"""Launch configurations of the CUDA kernels and the ring's arithmetic: host code, compiled and run without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
WARP = 32
PROGRAM = r"""
#include <cstdio>
#include <initializer_list>
#include "launch_config.h"
#include "ring.h"
using namespace lingbot::cuda;

void row(const char* of, const RowConfig& c, long long rows, int period, int steps = 0) {
  std::printf("{\"of\": \"%s\", \"dim\": %d, \"width\": %d, \"threads\": %d, \"vectors\": %d, \"rows\": %lld, "
              "\"period\": %d, \"steps\": %d}\n", of, c.dim, c.width, c.threads, c.vectors, rows, period, steps);
}

int main() {
  for (int dim = 8; dim <= 16384; dim += 8) {
    for (int width : {1, 4, 8}) {
      for (int rows : {1, 1131, 2262, 4524}) {
        row("residual", residual_row_config(dim, width), rows, 1);
        row("rms_norm", rms_norm_config(dim, width, rows, 132), rows, 1);
        const LayerNormConfig c = layer_norm_config(dim, width, rows, 132);
        row("layer_norm", c.row, rows, 1, c.steps);
      }
      for (int most : {2, 4}) row("quantize", quantize_config(dim, width, most), most, 1);
      for (int head_dim : {64, 128, 256}) {
        if (dim % head_dim != 0 || width == 1) continue;
        row("norm_rope", norm_rope_config(dim, head_dim, width), 0, head_dim / width);
      }
      const ColumnConfig c = column_config(dim, width);
      std::printf("{\"of\": \"columns\", \"dim\": %d, \"width\": %d, \"threads\": %d, \"rows\": %d}\n", dim, c.width,
                  c.threads, c.rows);
    }
    const UnpackConfig u = unpack_config(dim / 8);
    std::printf("{\"of\": \"unpack\", \"words\": %d, \"threads\": %d, \"rows\": %d, \"tokens\": %d}\n", dim / 8,
                u.threads, u.rows, u.tokens);
  }
  for (int threads = 32; threads <= 512; threads += 32) {
    for (int registers : {48, 64, 72}) {
      std::printf("{\"of\": \"resident\", \"threads\": %d, \"registers\": %d, \"blocks\": %d}\n", threads, registers,
                  resident_blocks(threads, registers));
    }
  }
  for (int sink : {0, 3}) {
    for (long long start = 0; start < 40; ++start) {
      const lingbot::Ring ring = {start, nullptr, sink, 11};
      const DeviceRing d = device_ring(ring);
      for (long long t = 0; t < 8; ++t) {
        const long long p = start + t, slot = p < sink ? p : sink + (p - sink) % (11 - sink);
        if (ring_slot(d.start + static_cast<uint32_t>(t), d.sink, d.period) != slot) return 1;
      }
    }
  }
  return 0;
}
"""


@pytest.fixture
def isa() -> None:
    """These configurations have no instruction set."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every configuration function gives for widths up to 16384; the ring's slots are checked on the way."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("launch_config")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    output = subprocess.run([folder / "main"], capture_output=True, text=True)
    assert output.returncode == 0, "a ring slot is wrong"
    return [json.loads(line) for line in output.stdout.splitlines()]


def of(configs: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    found = [c for c in configs if c["of"] in names]
    assert found
    return found


def test_rows_are_covered_by_whole_warps(configs: list[dict[str, Any]]) -> None:
    for c in of(configs, "residual", "rms_norm", "layer_norm", "norm_rope"):
        assert c["threads"] % WARP == 0 and WARP <= c["threads"] <= 1024
        if c["width"] == 1:
            continue  # element by element, any width
        assert c["threads"] * c["vectors"] * c["width"] >= c["dim"]
        assert c["vectors"] in (1, 2, 4) or (c["of"], c["threads"], c["vectors"]) == ("rms_norm", 128, 5)
        if c["vectors"] > 1:
            assert c["threads"] % c["period"] == 0  # a thread meets one set of angles


def test_tuned_widths(configs: list[dict[str, Any]]) -> None:
    shapes = {(c["of"], c["dim"], c["width"], c["rows"]): c for c in of(configs, "residual", "rms_norm", "layer_norm")}

    def shape(name: str, dim: int, width: int, rows: int) -> tuple[int, int, int]:
        c = shapes[name, dim, width, rows]
        return c["threads"], c["vectors"], c["steps"]

    for rows in (1131, 2262, 4524):
        assert shape("residual", 5120, 8, rows) == (320, 2, 0)
        assert shape("residual", 5120, 4, rows) == (320, 4, 0)
        assert shape("residual", 1536, 8, rows) == (96, 2, 0)
    assert shape("rms_norm", 5120, 8, 1131) == (128, 5, 0)
    assert shape("rms_norm", 5120, 8, 2262) == shape("rms_norm", 5120, 8, 4524) == (160, 4, 0)
    assert shape("layer_norm", 5120, 8, 1131)[:2] == shape("layer_norm", 5120, 8, 2262)[:2] == (320, 2)
    assert shape("layer_norm", 5120, 8, 1131)[2] > 0
    assert shape("layer_norm", 5120, 8, 4524) == (160, 4, 0)
    assert shape("layer_norm", 5120, 4, 1131) == (320, 4, 0)


def test_quantised_rows_are_covered_by_blocks_of_128(configs: list[dict[str, Any]]) -> None:
    for c in of(configs, "quantize"):
        padded = -(-c["dim"] // 128) * 128
        assert c["threads"] % WARP == 0 and c["vectors"] in (1, 2, 4)
        if c["width"] == 1:
            assert c["threads"] == 256
            continue
        assert c["width"] == 8 and c["threads"] * c["vectors"] * 8 >= padded
        assert c["threads"] <= (1024 if c["vectors"] == 1 else 512)
        assert 128 % (8 * c["vectors"]) == 0  # a thread's vectors lie in one block
    wide = {(c["dim"], c["rows"]): (c["threads"], c["vectors"]) for c in of(configs, "quantize") if c["width"] == 8}
    assert wide[5120, 2] == (320, 2) and wide[5120, 4] == (160, 4)
    assert wide[1536, 2] == wide[1536, 4] == (96, 2)
    assert wide[13824, 2] == wide[13824, 4] == (448, 4)
    assert wide[128, 2] == (32, 1) and wide[16384, 4] == (512, 4)


def test_resident_blocks_fit_a_multiprocessor(configs: list[dict[str, Any]]) -> None:
    for c in of(configs, "resident"):
        warps = c["blocks"] * c["threads"] // WARP
        quarter = -(-warps // 4)  # of a multiprocessor: the most warps that one has
        assert quarter * c["registers"] * WARP <= 65536 // 4


def test_columns_and_copies_are_covered(configs: list[dict[str, Any]]) -> None:
    for c in of(configs, "columns"):
        assert c["threads"] % WARP == 0 and c["threads"] <= 256 and c["rows"] >= 1
    for c in of(configs, "unpack"):
        assert c["threads"] % WARP == 0 and c["threads"] * c["rows"] <= 512
        assert c["tokens"] in (1, 2)
    whole = {c["words"]: c["threads"] for c in of(configs, "unpack")}
    assert whole[640] % 160 == 0 and 640 % whole[640] == 0
    assert 384 % whole[384] == 0 and 192 % whole[192] == 0


ATTENTION = r"""
#include <cstdio>
#include <vector>
#include "int8_attention_config.h"
using namespace lingbot::cuda;

int main() {
  long long cut_plans = 0;
  for (int heads : {1, 2, 10, 12, 20, 40}) {
    for (int queries : {1, 192, 193, 1131, 4524, 4680}) {
      for (int keys : {1, 96, 97, 1000, 1153, 5000, 27144}) {
        for (int multiprocessors : {1, 7, 132}) {
          for (bool share : {false, true}) {
            const AttentionPlan p = attention_plan(1, queries, keys, heads, 192, 96, multiprocessors, share);
            if (p.grid < 1 || p.grid > multiprocessors || p.whole_tiles > p.tiles) return 1;
            if (!share && p.whole_tiles != p.tiles) return 2;
            const int tiles = static_cast<int>(p.tiles), whole = static_cast<int>(p.whole_tiles);
            std::vector<int> times(static_cast<size_t>(tiles) * p.key_tiles), slots(2 * p.grid, -1);
            long long most = 0;
            for (int block = 0; block < p.grid; ++block) {
              AttentionWork work;
              long long taken = 0;
              for (int step = 0; attention_work(tiles, whole, p.key_tiles, block, p.grid, step, &work); ++step) {
                if (work.first < 0 || work.first >= work.end || work.end > p.key_tiles) return 3;
                if (work.slot >= 0 && slots[work.slot] != -1) return 4;
                if (work.slot >= 0) slots[work.slot] = work.tile;
                if ((work.slot < 0) != (work.end - work.first == p.key_tiles)) return 5;
                for (int k = work.first; k < work.end; ++k) ++times[static_cast<size_t>(work.tile) * p.key_tiles + k];
                taken += work.end - work.first;
              }
              most = taken > most ? taken : most;
            }
            for (int n : times) if (n != 1) return 6;
            if (whole == tiles) continue;
            ++cut_plans;
            if (most > (static_cast<long long>(tiles) * p.key_tiles + p.grid - 1) / p.grid + 1) return 7;
            const CutTiles cut = {static_cast<long long>(tiles - whole) * p.key_tiles, p.key_tiles, p.grid};
            for (int tile = 0; tile < tiles - whole; ++tile) {  // the merge finds every part, and no other
              int found = 0, made = 0;
              for (int s : slots) made += s == whole + tile;
              const long long end = static_cast<long long>(tile + 1) * p.key_tiles;
              for (int b = cut.first_block(tile); b < p.grid && cut.range_begin(b) < end; ++b) {
                const int slot = cut.slot(b, tile);
                if (slot >= 0 && slots[slot] != whole + tile) return 8;
                found += slot >= 0;
              }
              if (found != made) return 9;
            }
          }
        }
      }
    }
  }
  std::printf("%lld\n", cut_plans);
  return 0;
}
"""


def test_attention_takes_every_tile_once_and_evenly(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "main.cpp").write_text(ATTENTION)
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    output = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert output.returncode == 0, f"rule {output.returncode}"
    assert int(output.stdout) > 50  # plans with cut tiles among them
