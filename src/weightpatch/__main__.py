"""`python -m weightpatch` is the command `weightpatch`."""

import sys

from .cli import main

sys.exit(main())
