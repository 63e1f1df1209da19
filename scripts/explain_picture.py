"""Write docs/images/explain.png, the picture of the explain page, with Chromium (extra [test]).

python scripts/explain_picture.py
"""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from llama import Llama
from llama.explain.page import write_page

PROMPT = "Once upon a time there was a fox who lived near the sea"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "explain.png"


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "explain.html"
        write_page(Llama.build(device="cpu"), PROMPT, file, mp_size=2)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.goto(file.as_uri())
        page.evaluate("choose({layer: 2, head: 1, token: 8})")
        page.evaluate("document.querySelector('#attention h3:nth-of-type(2)').scrollIntoView()")
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
