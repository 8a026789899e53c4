"""Put the stored tables into the README, between their markers; run it after the benchmarks that make them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = {"table": "fashion_table.py", "editable": "editable_table.py"}

if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    for marker, script in TABLES.items():
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--readme"]
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        block = f"<!-- {marker} -->\n{table}\n<!-- end {marker} -->"
        text = re.sub(f"<!-- {marker} -->.*<!-- end {marker} -->", lambda _, block=block: block, text, flags=re.S)
    readme.write_text(text)
