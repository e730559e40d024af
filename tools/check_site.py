"""Looks at every page of the built site in a browser: what fails to load, links and anchors that lead nowhere.

python tools/check_site.py              the site in build/site (`make docs`)
python tools/check_site.py --pictures DIR     also a picture of each page

Needs Chromium and its driver (Debian: chromium, chromium-driver) and selenium. Links to other sites are not
followed; that a page asks another site for anything while it is shown is an error.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

SITE = Path(__file__).resolve().parent.parent / "build" / "site"

# On a busy machine `get` may come back with a page of which only a part is there.
WHOLE = """
return document.readyState === 'complete' && document.URL === arguments[0] && document.querySelector('footer') !== null;
"""
LOOK = """
const pictures = [...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src);
const links = [...document.querySelectorAll('a[href]')].map(a => a.href);
const places = [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name);
const wide = document.documentElement.scrollWidth > window.innerWidth + 1;
const raw = [...document.querySelectorAll('.arithmatex')].length;
return {pictures, links, places, wide, raw, title: document.title, text: document.body.innerText.length};
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


def serve() -> tuple[http.server.ThreadingHTTPServer, str]:
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = shutil.which("chromedriver")
    if not options.binary_location or not driver:
        raise SystemExit(
            "check_site: chromium and chromedriver were not found (Debian: chromium, chromium-driver)"
        )
    return webdriver.Chrome(options=options, service=Service(driver))


def requests_of(chrome: webdriver.Chrome) -> list[tuple[str, str]]:
    """(address, what went wrong or "") of all that the page asked for."""
    asked: dict[str, str] = {}
    found = []
    for entry in chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        details = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            asked[details["requestId"]] = details["request"]["url"]
        elif message["method"] == "Network.responseReceived":
            status = details["response"]["status"]
            found.append((details["response"]["url"], f"status {status}" if status >= 400 else ""))
        elif message["method"] == "Network.loadingFailed" and not details.get("canceled"):
            found.append((asked.get(details["requestId"], "?"), details["errorText"]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each page")
    arguments = parser.parse_args()
    pages = sorted(SITE.rglob("*.html"))
    if not pages:
        raise SystemExit(f"check_site: no site in {SITE}: make docs")
    server, base = serve()
    chrome = browser()
    problems: list[str] = []
    links: dict[str, set[str]] = {}  # address → the pages that lead there
    places: dict[str, set[str]] = {}
    try:
        for path in pages:
            address = base + path.relative_to(SITE).as_posix()
            name = path.relative_to(SITE).as_posix()
            chrome.get(address)
            WebDriverWait(chrome, 60).until(lambda c, address=address: c.execute_script(WHOLE, address))
            seen = chrome.execute_script(LOOK)
            places[address] = set(seen["places"])
            if name != "404.html":  # its links start at the top of a site whose address is not known here
                for link in seen["links"]:
                    links.setdefault(urljoin(address, link), set()).add(name)
            problems += [f"{name}: picture {p} is broken" for p in seen["pictures"]]
            problems += [f"{name}: {seen['raw']} formulas are shown as source"] if seen["raw"] else []
            problems += [f"{name}: hardly any text"] if seen["text"] < 200 and name != "404.html" else []
            problems += [f"{name}: wider than the window"] if seen["wide"] else []
            for url, wrong in requests_of(chrome):
                local = url.startswith(base)
                if not local and url.startswith("http"):
                    problems.append(f"{name}: asks another site for {url}")
                if wrong and local:
                    problems.append(f"{name}: {url}: {wrong}")
            for entry in chrome.get_log("browser"):
                if entry["level"] == "SEVERE" and base in entry["message"]:
                    problems.append(f"{name}: {entry['message']}")
            if arguments.pictures:
                picture = arguments.pictures / f"{name.replace('/', '-')}.png"
                arguments.pictures.mkdir(parents=True, exist_ok=True)
                chrome.save_screenshot(str(picture))
    finally:
        chrome.quit()
        server.shutdown()
    for link, sources in sorted(links.items()):
        if not link.startswith(base):
            continue
        page, anchor = urldefrag(link)
        file = SITE / unquote(urlparse(page).path.lstrip("/"))
        file = file / "index.html" if file.is_dir() else file
        target = base + file.relative_to(SITE).as_posix()
        if not file.exists():
            problems.append(f"{', '.join(sorted(sources))}: {link} leads nowhere")
        elif anchor and target in places and unquote(anchor) not in places[target]:
            problems.append(f"{', '.join(sorted(sources))}: {link}: no such place")
    print(
        "\n".join(dict.fromkeys(problems)) or f"site: {len(pages)} pages, {len(links)} links, nothing broken"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
