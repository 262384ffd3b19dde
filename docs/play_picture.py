"""Takes docs/play.png: `lingbot-kernels play --preset tiny` in a headless Chromium, with a key held.

PYTHONPATH=tests/play python docs/play_picture.py docs/play.png
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys

import browser
from PIL import Image

COMMAND = [sys.executable, "-m", "lingbot_kernels", "play", "--preset", "tiny", "--port", "0", "--seed", "1"]


async def take(url: str, path: str) -> None:
    async with browser.page_of(url, height=800) as page:
        await browser.until(page, "document.getElementById('frames').textContent.includes(' / ')", seconds=120)
        await page.keyboard.down("w")
        for _ in range(4):  # presses of another key, so that there are percentiles to show
            await page.keyboard.press("l", delay=300)
            await asyncio.sleep(1)
        shot = Image.open(io.BytesIO(await page.screenshot()))
    shot.convert("RGB").quantize(256).save(path, optimize=True)


def main(path: str) -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            asyncio.run(take(served.stdout.readline().split()[0], path))
        finally:
            served.terminate()
            served.communicate()


if __name__ == "__main__":
    main(sys.argv[1])
