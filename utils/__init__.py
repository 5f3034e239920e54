"""What the scripts share. Importing it stops with one line where they cannot run.

Older Pythons must be able to read this file; `make` runs it before it installs anything.
"""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(str(number) for number in sys.version_info[:3])
    sys.stderr.write(f"error: Python 3.11 or newer is needed, and this is {found}\n")
    sys.exit(2)
if not hasattr(os, "fork"):
    sys.stderr.write("error: this runs on Linux and macOS; on Windows use WSL\n")
    sys.exit(2)
