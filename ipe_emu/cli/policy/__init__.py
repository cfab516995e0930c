"""``ipe-emu policy …``: what can be said of a policy without a machine. These start fast."""

from ipe_emu.cli.policy import candidate, check, explain, show, sign, simulate
from ipe_emu.cli.subparsers import Subparsers


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command and its own commands."""
    parser = commands.add_parser("policy", help=line, description="What can be said of policies without a machine.")
    inner = parser.add_subparsers(title="commands", dest="policy_command", metavar="COMMAND", required=True)
    for module in (check, show, sign, explain, candidate, simulate):
        module.add_parser(inner)
