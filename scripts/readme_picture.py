"""Render the README's picture from a report page, with a Chromium on this machine; a tool for maintainers.

    weightpatch demo --output demo-output
    python scripts/readme_picture.py demo-output/report.html docs/images/report.png

The page loads nothing and runs no script, so the picture depends on the page and on the fonts installed (Inter first).
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def screenshot(page: Path, width: int, height: int, scale: float, dark: bool) -> Image.Image:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "page.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        window = (f"--window-size={width},{height}", f"--force-device-scale-factor={scale}")
        where = (f"--user-data-dir={folder}/profile", f"--screenshot={target}", page.resolve().as_uri())
        subprocess.run([browser, *FLAGS, scheme, *window, *where], check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(target.read_bytes())).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the report, an HTML file")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument(
        "--width", type=int, default=1060, help="of the window, in CSS pixels; Chromium takes no less than 500"
    )
    parser.add_argument("--height", type=int, default=1256, help="how much of the page to show, in CSS pixels")
    parser.add_argument("--scale", type=float, default=1.5, help="pixels of the picture per CSS pixel")
    parser.add_argument("--dark", action="store_true", help="show the dark page")
    args = parser.parse_args()
    found = screenshot(args.page, args.width, args.height, args.scale, args.dark)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    found.save(args.picture, optimize=True)
    print(f"{args.picture}: {found.width}×{found.height}, {args.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
