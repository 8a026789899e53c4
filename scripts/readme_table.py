"""Put the stored table of editors into the README, between its markers; run it after benchmarks/fashion_table.py."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
READ = [sys.executable, str(ROOT / "benchmarks" / "fashion_table.py"), "--readme"]

if __name__ == "__main__":
    table = subprocess.run(READ, check=True, capture_output=True, text=True).stdout.strip()
    readme = ROOT / "README.md"
    text = re.sub(
        r"<!-- table -->.*<!-- end -->",
        lambda _: f"<!-- table -->\n{table}\n<!-- end -->",
        readme.read_text(),
        flags=re.S,
    )
    readme.write_text(text)
