"""How every command adds its parser: description, examples, and nothing abbreviated."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction


def add_command(
    commands: Subparsers,
    name: str,
    line: str,
    run: Callable[[argparse.Namespace], int],
    *,
    description: str = "",
    examples: str,
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Add the command ``name``, which ``run`` carries out; ``line`` is its line in the list of commands."""
    parser = commands.add_parser(
        name,
        help=line,
        usage=usage,
        description=description or line[0].upper() + line[1:] + ".",
        epilog="examples:\n" + "".join(f"  {example}\n" for example in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser
