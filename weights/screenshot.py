"""Take the README's picture of the page, in Debian's chromium.

    make .venv/browser && .venv/bin/python weights/screenshot.py --out weights/page.png
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from nanoip2p.common import cli
from nanoip2p.common.files import CHECKOUT, check_writable

PICTURE = CHECKOUT / "weights/nano-ip2p/examples/house.png"
EDITS = ("turn the house blue", "turn the ground into snow", "make it night")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def take(out: Path) -> None:
    """Serve the page, edit an example on it, and write a picture of the page."""
    from playwright.sync_api import sync_playwright
    if not (chromium := shutil.which("chromium")):
        raise ValueError("the picture of the page needs a browser: apt-get install chromium")
    server = subprocess.Popen([sys.executable, "-m", "nanoip2p.app", "--port", "0", "--no-browser"],
                              cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": 1100, "height": 1010})
            page.goto(address)
            page.set_input_files("#picture input[type=file]", PICTURE)
            page.wait_for_selector("#picture img")
            for number, edit in enumerate(EDITS):
                page.fill("#instruction textarea, #instruction input", edit)
                page.click("#edit")
                page.wait_for_function(f"document.querySelectorAll('#history img').length > {number}")
            page.wait_for_timeout(2000)
            page.screenshot(path=out)
            browser.close()
    finally:
        server.terminate()


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code, see cli.run."""
    parser = cli.make_parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKOUT / "out/page.png")

    def work() -> None:
        out = parser.parse_args(argv).out
        check_writable(out)
        take(out)
        print(f"wrote {out}")
    return cli.run(work, "interrupted", "")


if __name__ == "__main__":
    sys.exit(main())
