"""Prints a project's dependencies, one a line: `python requirements.py pyproject.toml [EXTRA …]`.

An image installs them in a layer of its own, before the sources that change more often.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text("utf-8"))["project"]
extras = [line for extra in sys.argv[2:] for line in project["optional-dependencies"][extra]]
print("\n".join([*project["dependencies"], *extras]))
