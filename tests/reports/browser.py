"""A page in headless Chromium, in a frame of a given width."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def told_by(page: str, tell: str, width: int, folder: Path, dark: bool = False) -> str:
    """What a script in a page posts to the frame around it; an error in the console fails the test.

    Args:
        page: HTML; its tables are opened.
        tell: Script that posts a message when all is there.
        width: Of the frame, px: headless Chromium has no window narrower than 500 px, a frame reports its own width.
        folder: For the files.
        dark: Whether the reader prefers dark pages.
    """
    text = page.replace("<details>", "<details open>")
    (folder / "copy.html").write_text(text.replace("</body>", f"<script>{tell}</script></body>"))
    (folder / "frame.html").write_text(
        "<!DOCTYPE html><title>waiting</title><link rel=icon href=data:,>"
        "<script>onmessage = event => { document.title = 'told ' + event.data }</script>"
        f"<iframe src=copy.html style='width: {width}px; height: 900px; border: 0'></iframe>"
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    flags += f" --blink-settings=preferredColorScheme={int(not dark)}"
    flags += f" --virtual-time-budget=30000 --user-data-dir={folder / 'profile'} --window-size={width + 40},900"
    command = ["chromium", *flags.split(), (folder / "frame.html").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    told = re.search(r"<title>told (.*?)</title>", ran.stdout)
    assert told, ran.stderr + ran.stdout[:2000]
    return told[1]
