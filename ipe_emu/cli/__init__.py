"""The program ipe-emu: finds the command, and turns every error into a message and an exit status.

Only the module of the command that was asked for is imported, and a command imports what is slow (trio, pyfuse3,
cryptography) when it needs it: ``ipe-emu policy check`` must start fast.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ipe_emu import __version__
from ipe_emu.cli import exit_status
from ipe_emu.cli.output import complain, escape
from ipe_emu.errors import CannotEmulateError, IpeEmuError, KernelError, NotJudgedError, UserError

#: Every command: its module in this package, and its line in ``ipe-emu --help``.
COMMANDS = {
    "mount": "mount the emulated securityfs on a directory",
    "umount": "take a mounted emulator down",
    "boot": "boot an initramfs image and judge all that it executes",
    "run": "run a command whose every execution the emulator judges",
    "policy": "check, show, sign, explain, derive and simulate policies",
    "keys": "make test keys",
    "verity": "make and check dm-verity hash trees, fs-verity digests and signatures, and list those of a tree",
    "decide": "ask a mounted emulator about one operation on one file",
    "status": "show what a mounted emulator holds",
    "audit": "print the audit records of a mounted emulator",
    "doctor": "say what this machine can emulate, and how to mend what it cannot",
    "completion": "print completion for bash, zsh or fish",
}

_EXAMPLES = """\
examples:
  ipe-emu policy check lockdown.pol
  ipe-emu run --boot-policy boot.pol --boot-verified /usr -- sh -c 'cat /sys/kernel/security/ipe/enforce'
  ipe-emu mount ~/securityfs --boot-policy boot.pol && cat ~/securityfs/ipe/policies/*/name

exit status: 0 as expected, 1 the policy (or an expectation) failed it, 2 bad usage or input, 3 the program failed for
its own reasons, 4 something could not be judged (125 from run), 77 this machine cannot emulate it (see ipe-emu doctor)
"""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of every command, or of ``only`` one: the others are then named and nothing more."""
    parser = argparse.ArgumentParser(
        prog="ipe-emu",
        description="Rehearse Linux's Integrity Policy Enforcement LSM without a VM and without root.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ipe-emu {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        if only in (None, name):
            importlib.import_module(f"ipe_emu.cli.{name}").add_parser(commands, line)
        else:
            commands.add_parser(name, help=line, add_help=False)
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """Set apart what stands behind ``run … --``: argparse's idea of a second ``--`` differs between Pythons."""
    if arguments[:1] != ["run"] or "--" not in arguments:
        return arguments, None
    end = arguments.index("--")
    return arguments[:end], arguments[end + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status and lets no exception out but argparse's SystemExit."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):  # a test may have put a plain StringIO there
            stream.reconfigure(errors="backslashreplace")
    arguments, behind = _split(arguments)
    command = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(command if command in COMMANDS else "")
    args = parser.parse_args(arguments)
    if behind is not None:
        args.argv = behind
    ours = exit_status.RUN_FAILED if args.command == "run" else exit_status.NOT_JUDGED
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_status.BROKEN_PIPE
    except KeyboardInterrupt:
        return exit_status.INTERRUPTED
    except CannotEmulateError as error:
        complain(f"{error}\n  ipe-emu doctor says what this machine lacks and how to mend it")
        return exit_status.CANNOT_EMULATE
    except NotJudgedError as error:
        complain(f"could not be judged: {error}")
        return ours
    except UserError as error:
        complain(str(error))
        return exit_status.USAGE
    except KernelError as error:
        complain(f"{error} (the kernel answers {error.name})")
        return exit_status.USAGE
    except IpeEmuError as error:  # a part of ours gave up
        complain(str(error))
        return ours
    except OSError as error:
        named = isinstance(error.filename, str | bytes)  # and not a descriptor
        where = f"{escape(os.fsencode(error.filename))}: " if named else ""
        complain(f"{where}{error.strerror or error}")
        return exit_status.USAGE
    except Exception:
        complain("this is a defect of ipe-emu, and nothing was judged; please report it with the lines below")
        sys.excepthook(*sys.exc_info())
        return ours
    return status
