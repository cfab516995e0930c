"""``ipe-emu boot``: an initramfs image, rehearsed from /init on."""

import argparse
import functools
import os
import sys
from typing import TYPE_CHECKING

from ipe_emu.cli import exit_status
from ipe_emu.cli.audit_log import open_audit_log
from ipe_emu.cli.files import check_writable, write_report
from ipe_emu.cli.options import add_machine_options, boot_ipe
from ipe_emu.cli.output import announce, escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.errors import NotJudgedError, UserError

if TYPE_CHECKING:
    from ipe_emu.rehearse.report import Summary

#: COMMAND_LINE_SIZE of x86_64 and aarch64, the NUL at the end included.
_COMMAND_LINE_SIZE = 2048
_LONGEST_TIMEOUT = 1_000_000


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "boot",
        line,
        run,
        usage="ipe-emu boot [options] IMAGE [IMAGE ...]",
        description=(
            "Boot an initramfs image as a machine would, from the kernel's execution of /init on, with the emulated IPE"
            " judging every execution. No root and no virtual machine is needed, and nothing in the image is changed."
            " This is a rehearsal and no security boundary: an image that means to can get around it."
        ),
        examples="""\
ipe-emu boot --boot-policy boot.pol --cmdline 'ipe.success_audit=1' initrd.img
ipe-emu boot --kernel linux-7.3 --boot-policy boot.pol --builtin-keys signer.pem --until switch-root initrd.img
ipe-emu boot --boot-policy boot.pol --html report.html --json report.json initrd.img""",
    )
    parser.add_argument(
        "image",
        nargs="+",
        metavar="IMAGE",
        help="a UKI, a directory as an initramfs has it, or initramfs files, put behind each other as boot loaders do",
    )
    parser.add_argument("--uki-profile", type=int, metavar="N", help="which profile of a UKI (default: @0, if any)")
    parser.add_argument(
        "--until",
        choices=("exit", "switch-root"),
        default="exit",
        help="when to end: when the machine does, or already when the init process executes one of another root",
    )
    parser.add_argument(
        "--then",
        metavar="COMMAND",
        help="when the init process executes one of another root, run this there too, by a shell; its end is the end",
    )
    parser.add_argument(
        "--shell",
        action="store_true",
        help="when the machine has come to its end, stop it there and open a shell in it, on this terminal; the report"
        " follows. The shell is a busybox of yours; what it does does not count",
    )
    parser.add_argument(
        "--shell-on-denial",
        action="store_true",
        help="the same where something is denied, or not judged, for the first time; then the machine goes on",
    )
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="vda=IMAGE[,serial=TEXT][,ro|,write]",
        help="a virtio disk, repeatable; what is written to it is forgotten at the end, unless it says write",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON, with every event")
    parser.add_argument(
        "--html", metavar="FILE", help="write the report as one HTML page, with the timeline as a picture"
    )
    parser.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="end the rehearsal after so long, as failed"
    )
    add_machine_options(parser)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= _LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(f"not between 0 and {_LONGEST_TIMEOUT} seconds: {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Boot the image."""
    if args.then is not None and args.until == "switch-root":
        raise UserError("--then and --until switch-root: there the rehearsal ends before anything runs")
    wants_shell = args.shell or args.shell_on_denial
    if wants_shell and not (os.isatty(0) and os.isatty(1)):
        option = "--shell" if args.shell else "--shell-on-denial"
        raise UserError(f"{option}: standard input and output must be a terminal: somebody has to type")
    profile = announce(args.kernel)
    from ipe_emu.exec_hook.sandbox import SignalledError
    from ipe_emu.kernel_cmdline import parse_cmdline
    from ipe_emu.rehearse.block.device import BlockDevices
    from ipe_emu.rehearse.block.disk import Disk, attach, probe_all
    from ipe_emu.rehearse.boot import BootOptions, boot
    from ipe_emu.rehearse.events import Interrupted, NotJudged, Timeline
    from ipe_emu.rehearse.image.open import open_image
    from ipe_emu.rehearse.report import summarise
    from ipe_emu.rehearse.shell import Program
    from ipe_emu.rehearse.watch import WatchedIpe

    devices = BlockDevices()
    disks = [Disk.parse(text) for text in args.disk]
    emit = open_audit_log(args.audit_log)
    timeline = Timeline()
    for kind in _REPORTS:
        _check_report(args, kind)
    with open_image(args.image, profile, uki_profile=args.uki_profile) as image:
        args.cmdline = args.cmdline or image.cmdline or ""
        if len(os.fsencode(args.cmdline)) >= _COMMAND_LINE_SIZE:
            raise UserError(f"the command line is longer than {_COMMAND_LINE_SIZE - 1} bytes, where kernels cut it")
        attach(disks, devices, force_gpt=parse_cmdline(os.fsencode(args.cmdline)).force_gpt)
        booted: list[WatchedIpe] = []

        def make_ipe(timeline: Timeline) -> WatchedIpe:
            booted.append(boot_ipe(args, profile, functools.partial(WatchedIpe, timeline=timeline), emit))
            return booted[0]

        options = BootOptions(
            profile=profile,
            devices=devices,
            probe=functools.partial(probe_all, disks, devices),
            unshiftable="the file systems of its disks" if disks else None,
            make_ipe=make_ipe,
            image=image,
            cmdline=os.fsencode(args.cmdline),
            timeout=args.timeout,
            stop_at_switch_root=args.until == "switch-root",
            then=args.then,
            shell_program=Program.open() if wants_shell else None,
            shell_at_end=args.shell,
            shell_on_denial=args.shell_on_denial,
            release=image.uname,
        )
        signalled: int | None = None
        try:
            boot(options, timeline, say)
        except SignalledError as interrupted:
            if not timeline.started:
                return interrupted.status
            signalled = interrupted.status
            timeline.add(Interrupted(timeline.now, None, str(interrupted)))
        except NotJudgedError as error:
            timeline.add(NotJudged(timeline.now, None, "boot", str(error)))
    summary = summarise(timeline.events, [refusal for ipe in booted for refusal in ipe.upstream_refusals])
    return _report(args, summary, _status(summary) if signalled is None else signalled)


def _report(args: argparse.Namespace, summary: "Summary", status: int) -> int:
    """Write the reports, the text last; return the exit status."""
    from ipe_emu.rehearse.report.text import lines_of

    for kind, form in _REPORTS.items():
        if (path := getattr(args, kind)) is not None:
            try:
                write_report(path, form(summary, status))
            except OSError as error:
                say(f"--{kind} {escape(path)}: {error.strerror}")
                status = status or exit_status.USAGE
    headline, *lines = lines_of(summary)
    say(f"result: {headline}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return status


def _status(summary: "Summary") -> int:
    from ipe_emu.rehearse.verdict import Result

    return {
        Result.AS_EXPECTED: exit_status.OK,
        Result.DENIED: exit_status.DENIED,
        Result.INTERRUPTED: exit_status.PROGRAM_FAILED,
        Result.PROGRAM_FAILED: exit_status.PROGRAM_FAILED,
        Result.NOT_JUDGED: exit_status.NOT_JUDGED,
    }[summary.verdict.result]


def _json(summary: "Summary", status: int) -> str:
    from ipe_emu.rehearse.report import as_json

    return as_json.dump(summary, status=status) + "\n"


def _html(summary: "Summary", _status: int) -> str:
    from ipe_emu.rehearse.report import html

    return html.page(summary)


_REPORTS = {"json": _json, "html": _html}


def _check_report(args: argparse.Namespace, kind: str) -> None:
    """Find out before anything is started whether a report can be written."""
    path = getattr(args, kind)
    if path is not None:
        try:
            check_writable(path)
        except OSError as error:
            raise UserError(f"--{kind} {escape(path)}: {error.strerror}") from None
