"""Debian's Chromium without root, for tests and pictures of the web page."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.downloads import debian_package

# Its libraries without what it does not load here: desktops, printers' and sound's servers, OpenGL.
_LIBRARIES = (
    r"(?!lib(c6|gcc|stdc|c-bin|kf5|.*qt|gtk|llvm|.*perl|.*mesa|pam|polkit|gnome|gconf|adwaita|"
    r"debian|db5|cryptsetup|fuse|z3|gdbm|pipewire|spa|drm-|canberra|krb5support-|ssl3-))"
    r"(lib.*|chromium-common|fonts-dejavu-core)"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser (playwright's Browser). Raises DownloadError."""
    from playwright.sync_api import sync_playwright

    folder = debian_package("chromium", along=_LIBRARIES)
    found = [*folder.glob("usr/lib/*-linux-gnu"), *folder.glob("usr/lib/*-linux-gnu/pulseaudio")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, found))}
    program = folder / "usr" / "lib" / "chromium" / "chromium"
    # Its sandbox needs a privilege that containers do not have. It shows our own page only.
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, env=environment, args=options)
        try:
            yield browser
        finally:
            browser.close()
