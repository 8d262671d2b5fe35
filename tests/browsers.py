"""A headless Chromium for the tests, where this machine has one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # as root it has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-features=PasswordLeakDetection,MediaRouter",
)


def chromium() -> tuple[str, str]:
    """The browser and its driver; skips the test where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium with chromedriver here (Debian: chromium, chromium-driver)")
    return browser, driver


@contextmanager
def headless(
    folder: Path, *, size: str = "1280,900", dark: bool = False
) -> Iterator[webdriver.Chrome]:
    """A new browser with an empty profile; its processes end with the block."""
    binary, driver = chromium()
    options = Options()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--window-size={size}", f"--user-data-dir={folder}/profile"):
        options.add_argument(argument)
    if dark:
        options.add_argument("--force-dark-mode")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    service = Service(driver, env=os.environ | home)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        allow = {"behavior": "allow", "downloadPath": str(folder)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", allow)
        yield browser
    finally:
        browser.quit()
        service.stop()
