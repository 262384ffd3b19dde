"""A pytest plugin: sglang as `sglang_environment` has it, and every K/V cache that a test makes a ring at once."""

from __future__ import annotations

import sglang_environment

sglang_environment.install()

from sglang.multimodal_gen.runtime.layers.kvcache import causal_attention_cache  # noqa: E402

from lingbot_kernels.integrations import sglang_ring  # noqa: E402

_Cache = causal_attention_cache.CausalSelfAttentionKVCache
_begin = _Cache.__post_init__
made = 0


def _begin_as_ring(cache: _Cache) -> None:
    global made
    _begin(cache)
    sglang_ring.enter(cache)
    made += 1


_Cache.__post_init__ = _begin_as_ring


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"{made} caches were rings")
