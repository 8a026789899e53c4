"""Put the stored tables into README and docs, between their markers; run it after the benchmarks that make them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = (
    ("README.md", "table", "fashion_table.py"),
    ("README.md", "editable", "editable_table.py"),
    ("README.md", "ladder", "metric_table.py"),
    ("docs/choosing-an-editor.md", "choosing", "metric_table.py"),
    ("docs/translation.md", "translations", "translation_table.py"),
)

if __name__ == "__main__":
    for page, marker, script in TABLES:
        text = (ROOT / page).read_text()
        asked = "--advice" if marker == "choosing" else "--readme"
        command = [sys.executable, str(ROOT / "benchmarks" / script), asked]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        block = f"<!-- {marker} -->\n{table}\n<!-- end {marker} -->"
        text = re.sub(f"<!-- {marker} -->.*<!-- end {marker} -->", lambda _, block=block: block, text, flags=re.S)
        if "--check" not in sys.argv:
            (ROOT / page).write_text(text)
        elif text != (ROOT / page).read_text():
            raise SystemExit(f"{page}: the table {marker} is not the stored one; run python scripts/readme_table.py")
