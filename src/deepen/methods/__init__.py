"""The methods, one folder each, and those dropped into folders that DEEPEN_METHODS_PATH names (written as in PATH)."""

import os
from pathlib import Path

# Absolute, so that a later change of the working folder changes nothing.
__path__.extend(
    str(Path(folder).resolve()) for folder in os.environ.get("DEEPEN_METHODS_PATH", "").split(os.pathsep) if folder
)
