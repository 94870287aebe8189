"""Opens a page in the Chromium of Qt, without a window: browser.py PAGE PICTURE WIDTH light|dark; prints what it saw as JSON.

A file of its own, so that what befalls a browser does not befall the tests.
"""

import json
import os
import sys

PAGE, PICTURE, WIDTH, SCHEME = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")  # which root, as in containers, cannot have
preferred = 0 if SCHEME == "dark" else 1
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"--disable-gpu --headless --blink-settings=preferredColorScheme={preferred}"

from PySide6.QtCore import QTimer, QUrl  # noqa: E402  (reads the settings above)
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor  # noqa: E402
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

LOOK = """(() => {
  const head = [...document.querySelectorAll("th")].find((one) => one.textContent === "arm");
  const column = () => [...head.closest("table").tBodies[0].rows].map((row) => row.cells[0].textContent);
  head.click(); const up = column(); head.click(); const down = column();
  const drawn = [...document.querySelectorAll("svg")].map((one) => one.getBoundingClientRect().width);
  return JSON.stringify({up, down, sorted: head.getAttribute("aria-sort"), width: document.documentElement.scrollWidth,
    inner: innerWidth, ground: getComputedStyle(document.body).backgroundColor, drawn, text: document.body.innerText.length});
})()"""


class Requests(QWebEngineUrlRequestInterceptor):
    seen = []

    def interceptRequest(self, info):
        self.seen.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    said = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.said.append(message)


app = QApplication(sys.argv[:1])
view, requests = QWebEngineView(), Requests()
page = Page(view)
page.profile().setUrlRequestInterceptor(requests)
view.setPage(page)
view.resize(WIDTH, 1400)


def told(found):
    view.grab().save(PICTURE)
    print(json.dumps(json.loads(found) | {"said": page.said, "requests": requests.seen}))
    app.quit()


view.loadFinished.connect(lambda ok: QTimer.singleShot(800, lambda: page.runJavaScript(LOOK, told)))
QTimer.singleShot(60_000, app.quit)
view.load(QUrl.fromLocalFile(os.path.abspath(PAGE)))
view.show()
app.exec()
