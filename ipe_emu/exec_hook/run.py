"""``ipe-emu run``: a command tree in a sandbox, under the exec hook, with the emulated securityfs in its place."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from ipe_emu.exec_hook import footing, hook, mount_plan
from ipe_emu.exec_hook.blueprint import Blueprint, Command
from ipe_emu.exec_hook.mount_plan import Wanted
from ipe_emu.exec_hook.report import Report
from ipe_emu.exec_hook.sandbox import Sandbox, SignalledError, Surroundings
from ipe_emu.exec_hook.supervisor import Notifications, SecurityFsServer
from ipe_emu.integrity.declared import Declared, Entry, MountAttachment
from ipe_emu.linux.seccomp import Listener
from ipe_emu.lsm import Ipe

#: Returned where an error of ours, or something that could not be judged, stands in for the command's status.
FAILED: Final = 125
#: Returned with ``fail_on_deny`` when anything was denied.
DENIED: Final = 1


@frozen
class RunOptions:
    """What to rehearse, and how.

    ``make_ipe`` makes the booted emulator; it is called while the sandbox is being made. ``audit_log`` is the file that
    records are appended to, which the tree may read and not write; ``concealed`` are directories that it must not
    reach.
    """

    command: Sequence[str]
    make_ipe: Callable[[], Ipe]
    declared: Declared
    audit_log: Path | None = None
    concealed: Sequence[Path] = ()
    fail_on_deny: bool = False
    debug: bool = False


def run(options: RunOptions) -> int:
    """Run the command and return its exit status, or one of ours (see ``FAILED``, ``DENIED``).

    Reports on stderr what was denied. Must be called in the main thread of a process that has no others; without
    privileges, this process is in a user namespace of its own afterwards. CannotEmulateError where this machine cannot
    do it: nothing was started then.
    """
    command = Command.inherited(options.command)
    standing = footing.obtain()
    verity = [e for e in options.declared.entries if e.facts.dmverity_roothash is not None]
    wanted = Wanted(
        verity=[_path_of(e) for e in verity],
        read_only=[options.audit_log.resolve()] if options.audit_log is not None else [],
        concealed=options.concealed,
        owns_disks=standing.owns_disks,
    )
    blueprint = Blueprint(
        steps=mount_plan.plan(wanted),
        own_securityfs=True,
        read_only_controls=standing.owns_disks,
        located=[_path_of(entry) for entry in options.declared.entries],
        rules=hook.rules(securityfs=True),
        command=command,
    )
    for note in standing.notes:
        _say(note)
    if options.debug:
        _say(f"sandbox: {standing.ids.describe()}")
        for line in blueprint.describe():
            _say(f"sandbox: {line}")
    report = Report()
    try:
        with Sandbox(blueprint, standing.ids) as sandbox:
            status, ipe = _supervise(options, sandbox, report)
    except SignalledError as interrupted:
        return interrupted.status
    for line in report.lines(ipe.upstream_refusals):
        _say(line)
    if not report.all_judged:
        return FAILED
    return DENIED if options.fail_on_deny and report.denied_events else status


def _supervise(options: RunOptions, sandbox: Sandbox, report: Report) -> tuple[int, Ipe]:
    server = SecurityFsServer(report, sandbox.kill)
    server.start()
    try:
        ipe = options.make_ipe()
        fuse = sandbox.fuse()
        sandbox.map_ids()
        surroundings = sandbox.surroundings()
        facts = options.declared.attach(_attachments(options.declared, surroundings))
        server.serve(fuse, ipe, facts, surroundings)
        exec_hook = hook.ExecHook(
            ipe, facts, report, machine=surroundings.user_namespace, securityfs=surroundings.securityfs_device
        )
        notifications = Notifications(exec_hook, Listener(sandbox.listener()), report, sandbox.kill)
        notifications.start()
        status = sandbox.wait()
        notifications.join()
    finally:
        sandbox.kill()
        server.stop()
        server.join()
    return status, ipe


def _path_of(entry: Entry) -> Path:
    return Path(os.fsdecode(entry.path))


def _attachments(declared: Declared, surroundings: Surroundings) -> dict[bytes, MountAttachment]:
    return {
        entry.path: MountAttachment(mount, own_mount=entry.facts.dmverity_roothash is not None)
        for entry, mount in zip(declared.entries, surroundings.mounts, strict=True)
    }


def _say(line: str) -> None:
    print(f"ipe-emu: {line}", file=sys.stderr, flush=True)
