"""``ipe-emu boot``: an initramfs image, rehearsed from /init on."""

import argparse
import functools
import os

from ipe_emu.cli import exit_status
from ipe_emu.cli.audit_log import open_audit_log
from ipe_emu.cli.options import add_machine_options, boot_ipe
from ipe_emu.cli.output import announce, escape, say
from ipe_emu.cli.subparsers import Subparsers, add_command


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "boot",
        line,
        run,
        usage="ipe-emu boot [options] IMAGE",
        description=(
            "Boot an initramfs image as a machine would, from the kernel's execution of /init on, with the emulated IPE"
            " judging every execution. No root and no virtual machine is needed, and nothing in the image is changed."
            " This is a rehearsal and no security boundary: an image that means to can get around it."
        ),
        examples="""\
ipe-emu boot --boot-policy boot.pol --cmdline 'ipe.success_audit=1' initrd.img
ipe-emu boot --kernel linux-7.3 --boot-policy boot.pol --builtin-keys signer.pem --until switch-root initrd.img""",
    )
    parser.add_argument("image", metavar="IMAGE", help="an initramfs, a UKI, or a directory as an initramfs has it")
    parser.add_argument(
        "--until",
        choices=("exit", "switch-root"),
        default="exit",
        help="when to end: when the machine does, or already when the init process executes one of another root",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="end the rehearsal after so long, as failed")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Boot the image."""
    profile = announce(args.kernel)
    from ipe_emu.exec_hook.sandbox import SignalledError
    from ipe_emu.rehearse.boot import BootOptions, boot
    from ipe_emu.rehearse.events import Timeline
    from ipe_emu.rehearse.image import open_image, unpack
    from ipe_emu.rehearse.verdict import Result, verdict
    from ipe_emu.rehearse.watch import WatchedIpe

    emit = open_audit_log(args.audit_log)
    timeline = Timeline()
    with open_image([args.image], profile) as image:
        options = BootOptions(
            make_ipe=lambda timeline: boot_ipe(args, profile, functools.partial(WatchedIpe, timeline=timeline), emit),
            unpack=functools.partial(unpack, image.members),
            cmdline=os.fsencode(args.cmdline or image.cmdline or ""),
            timeout=args.timeout,
            stop_at_switch_root=args.until == "switch-root",
        )
        try:
            booted = boot(options, timeline, say)
        except SignalledError as interrupted:
            return interrupted.status
    active = booted.ipe.active
    policy = None if active is None else active.policy
    say("active at the end: " + ("no policy" if policy is None else f"{policy.name} {policy.version}"))
    for line in booted.report.lines(booted.ipe.upstream_refusals):
        say(line)
    judged = verdict(timeline.events)
    say(f"result: {judged.result.value}: {escape(judged.reason)}")
    return {
        Result.AS_EXPECTED: exit_status.OK,
        Result.DENIED: exit_status.DENIED,
        Result.PROGRAM_FAILED: exit_status.PROGRAM_FAILED,
        Result.NOT_JUDGED: exit_status.NOT_JUDGED,
    }[judged.result]
