"""A real browser before the page: Debian's chromium, headless, driven by playwright."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def why_not() -> str | None:
    """None where there is a browser and what drives it, else what is missing."""
    try:
        import playwright.async_api  # noqa: F401
    except ImportError as error:
        return f"playwright can't be imported ({error})"
    return None if path() else f"none of {', '.join(NAMES)} is on PATH"


def path() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.asynccontextmanager
async def page_of(url: str, width: int = 900, height: int = 760) -> AsyncIterator[Any]:
    """The page at `url`, and under `errors` what its console complained of."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = await playwright.chromium.launch(executable_path=path(), args=arguments)
        try:
            page = await browser.new_page(viewport={"width": width, "height": height})
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
            await page.goto(url)
            yield page
        finally:
            await browser.close()


async def picture(page: Any) -> str:
    """What the canvas shows, as a data URL."""
    return str(await page.evaluate("document.getElementById('world').toDataURL()"))


async def shown(page: Any, name: str) -> str:
    return str(await page.inner_text(f"#{name}"))


async def until(page: Any, expression: str, seconds: float = 40.0) -> None:
    """Wait until a JavaScript expression is true of the page; its security policy lets no script be told to wait."""
    deadline = time.monotonic() + seconds
    while not await page.evaluate(expression):
        assert time.monotonic() < deadline, (expression, await page.inner_text("body"), page.errors)
        await asyncio.sleep(0.05)
