"""A headless Chromium driven over the WebDriver protocol: plain HTTP to chromedriver."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
MISSING = '' if CHROMIUM and DRIVER else 'no Chromium with chromedriver (apt-get install chromium chromium-driver)'
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
         '--hide-scrollbars', '--host-resolver-rules=MAP * ~NOTFOUND')  # fmt: skip


class Browser:
    """One window. Methods raise RuntimeError with the driver's own words."""

    def __init__(self, address: str, session: str):
        self._session = f'{address}/session/{session}'

    def open(self, page: Path) -> None:
        _ask('POST', f'{self._session}/url', {'url': page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a function body returns; it finds its arguments in `arguments`."""
        return _ask('POST', f'{self._session}/execute/sync', {'script': script, 'args': list(arguments)})

    def resize(self, width: int, height: int) -> None:
        self.command(
            'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def dark(self, on: bool) -> None:
        self.command(
            'Emulation.setEmulatedMedia',
            features=[{'name': 'prefers-color-scheme', 'value': 'dark' if on else 'light'}],
        )

    def command(self, name: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return _ask('POST', f'{self._session}/goog/cdp/execute', {'cmd': name, 'params': parameters})

    def click(self, selector: str) -> None:
        """A real click of the pointer in the middle of the first element found, scrolled into sight."""
        box = self.run(
            """const e = document.querySelector(arguments[0]);
            e.scrollIntoView({block: 'center', behavior: 'instant'});
            const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];""",
            selector,
        )
        for kind in ('mousePressed', 'mouseReleased'):
            self.command('Input.dispatchMouseEvent', type=kind, x=box[0], y=box[1], button='left', clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """Picks an option of a select, as a user's choice does."""
        self.run(
            """const e = document.querySelector(arguments[0]); e.value = arguments[1];
            e.dispatchEvent(new Event('change', {bubbles: true}));""",
            selector,
            value,
        )

    def type(self, selector: str, text: str) -> None:
        self.click(selector)
        self.command('Input.insertText', text=text)

    def messages(self) -> list[str]:
        """What the page logged as errors or failed to load since the last call."""
        found = _ask('POST', f'{self._session}/se/log', {'type': 'browser'})
        return [entry['message'] for entry in found if entry['level'] in ('SEVERE', 'WARNING')]

    def picture(self, target: Path, whole: bool = False) -> None:
        found = self.command('Page.captureScreenshot', format='png', captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(found['data']))


@contextlib.contextmanager
def start() -> Iterator[Browser]:
    """A browser with a fresh profile that reaches no network; it ends with the block."""
    driver = subprocess.Popen([DRIVER, '--port=0'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        port = next(m[1] for line in driver.stdout if (m := re.search(r'started successfully on port (\d+)', line)))
        address = f'http://127.0.0.1:{port}'
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = {'binary': CHROMIUM, 'args': [*FLAGS, f'--user-data-dir={profile}']}
            wanted = {'alwaysMatch': {'goog:chromeOptions': options, 'goog:loggingPrefs': {'browser': 'ALL'}}}
            session = _ask('POST', f'{address}/session', {'capabilities': wanted})['sessionId']
            try:
                yield Browser(address, session)
            finally:
                _ask('DELETE', f'{address}/session/{session}')
    finally:
        driver.terminate()
        driver.wait(10)
        driver.stdout.close()


def _ask(method: str, url: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={'Content-Type': 'application/json'},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)['value']
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(json.load(error)['value']['message']) from None
