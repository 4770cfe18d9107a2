"""deepen methods"""

from dataclasses import dataclass

from deepen.cli.output import print_table
from deepen.core import registry


@dataclass(frozen=True)
class Options:
    """List the methods that are installed here, with their presets.

    A method is a folder; DEEPEN_METHODS_PATH names folders that hold more of them.
    """


def run(options: Options) -> int:
    """Print the table."""
    rows = [
        (method.name, method.summary, ", ".join(method.preset_paths()) or None)
        for method in registry.discover().values()
    ]
    print_table(("method", "what it does", "presets"), rows)
    return 0
