"""Write docs/images/page.png: the page of `comemo serve nano` after two questions.

    python docs/write_page_image.py

Needs selenium, chromium and chromedriver. Times in the picture are those of this machine.
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from comemo.nano.drawing import draw
from comemo.nano.showing import shown_scene

TARGET = Path(__file__).parent / "images" / "page.png"
SEED, LAYOUT = 41, "sign"  # of `comemo draw`
QUESTIONS = ("Which number is on the sign?", "Describe the picture.")
SIZE = (1200, 910)


def open_browser() -> Any:
    """A headless Chromium of a fixed size."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    sizes = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    return driver


def show(driver: Any, address: str, picture: Path) -> bytes:
    """Ask the questions, look at the last word, and take a PNG."""
    from selenium.webdriver.support.ui import WebDriverWait

    def all_of(selector: str) -> list[Any]:
        return driver.find_elements("css selector", selector)

    wait = WebDriverWait(driver, 60)
    driver.get(address)
    driver.find_element("id", "file").send_keys(str(picture))
    wait.until(lambda _: picture.name in driver.find_element("id", "facts").text)
    for count, question in enumerate(QUESTIONS, 1):
        driver.find_element("id", "question").send_keys(question, "\ue007")  # Enter
        wait.until(lambda _, count=count: len(all_of(".bar")) == count)
        wait.until(lambda _: not all_of("li[aria-busy]"))
    all_of(".word")[-2].click()  # the one after it is "all words"
    wait.until(lambda _: "“" in driver.find_element("id", "readout").text)
    return driver.get_screenshot_as_png()


def main() -> None:
    """Start a server and a browser, and write the picture."""
    command = [sys.executable, "-m", "comemo", "serve", "nano", "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            picture = Path(folder) / "sign.png"
            draw(shown_scene(SEED, LAYOUT)).save(picture)
            assert server.stdout is not None
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address is not None
            driver = open_browser()
            try:
                shot = show(driver, address[0], picture)
            finally:
                driver.quit()
        finally:
            server.terminate()
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image.save(TARGET, optimize=True)
    print(f"{TARGET}: {image.width} x {image.height} px, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
