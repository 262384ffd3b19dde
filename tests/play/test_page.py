"""The page in a real browser: a key is held, the world moves, figures are drawn, a closed tab gives its memory back."""

from __future__ import annotations

import re
from pathlib import Path

import browser
import pytest
from viewers import PROMPT, eventually, run, served

pytestmark = pytest.mark.skipif(browser.why_not() is not None, reason=str(browser.why_not()))
DRAWN = "Number(document.getElementById('frames').textContent.split(' / ')[0]) > {}"


def test_a_held_key_moves_the_world_and_a_closed_tab_frees_it(pipeline, tmp_path: Path) -> None:
    begun = []

    def begin():
        begun.append(pipeline.session(PROMPT, height=48, width=80, seed=3))
        return begun[-1]

    async def test() -> None:
        async with served(pipeline, begin, fps=60) as server:
            async with browser.page_of(server.url) as page:
                await browser.until(page, DRAWN.format(0))
                before = await browser.picture(page)
                assert await browser.shown(page, "latency") == "press a key"
                await page.keyboard.down("w")
                await browser.until(page, "document.getElementById('latency').textContent.endsWith(' ms')")
                assert "held" in str(await page.get_attribute("#key-w", "class"))
                count = int((await browser.shown(page, "frames")).split(" / ")[0])
                await browser.until(page, DRAWN.format(count + 12))
                assert await browser.picture(page) != before
                await page.keyboard.up("w")
                assert "held" not in str(await page.get_attribute("#key-w", "class") or "")
                assert re.fullmatch(r"\d+ / \d+ ms", await browser.shown(page, "latency"))
                assert re.fullmatch(r"[\d.]+", await browser.shown(page, "fps"))
                assert re.fullmatch(r"\d+ ms for \d+ frames", await browser.shown(page, "chunk"))
                assert re.fullmatch(r"[\d.]+ [MG]iB / [\d.]+ [MG]iB", await browser.shown(page, "memory"))
                (session,) = begun
                assert session.nbytes() > 0 and page.errors == []
                await page.screenshot(path=str(tmp_path / "page.png"))
            await eventually(lambda: not server.worker.sessions())
            await eventually(lambda: session.nbytes() == 0)

    run(test)
    assert (tmp_path / "page.png").stat().st_size > 5_000


def test_a_refused_page_says_why(pipeline) -> None:
    async def test() -> None:
        async with served(pipeline, max_sessions=1) as server, browser.page_of(server.url) as first:
            await browser.until(first, DRAWN.format(0))
            async with browser.page_of(server.url) as second:
                await browser.until(second, "document.getElementById('message').className == 'bad'")
                assert "all sessions are taken (1)" in await browser.shown(second, "message")

    run(test)
