"""``ipe-emu run``: a command tree in a sandbox, under the exec hook, with the emulated securityfs in its place."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import evolve, frozen

from ipe_emu.errors import NotJudgedError, UserError
from ipe_emu.exec_hook import agent, footing, hook, mount_plan
from ipe_emu.exec_hook.blueprint import Blueprint, Command
from ipe_emu.exec_hook.emulators import Emulator, MountedEmulator, OwnEmulator
from ipe_emu.exec_hook.footing import Footing, Kind
from ipe_emu.exec_hook.mount_plan import Wanted
from ipe_emu.exec_hook.report import Report
from ipe_emu.exec_hook.sandbox import Sandbox, SignalledError
from ipe_emu.exec_hook.session_mounts import PlannedVolume
from ipe_emu.exec_hook.supervisor import Notifications
from ipe_emu.integrity.declared import Declared
from ipe_emu.integrity.sources import Place
from ipe_emu.linux.seccomp import Listener
from ipe_emu.lsm import Ipe
from ipe_securityfs.control import make_runtime_directory, runtime_directories

if TYPE_CHECKING:
    from ipe_emu.volumes.image import VerifiedImage

#: Returned where an error of ours, or something that could not be judged, stands in for the command's status.
FAILED: Final = 125
#: Returned with ``fail_on_deny`` when anything was denied.
DENIED: Final = 1


@frozen
class RunOptions:
    """What to rehearse, and how.

    ``make_ipe`` makes the booted emulator, and ``declared`` is what it knows of files; it is called while the sandbox
    is being made. With ``attach`` both are not used: the emulator that is mounted there decides. ``audit_log`` is the
    file that records are appended to, which the tree may read and not write. ``volumes`` are mounted in this order, as
    dm-0 and so on, and files below the directories ``sealable`` can be sealed; not with ``attach``.
    ``dm_verity_unsealed`` is the kernel parameter ``dm_verity.keyring_unsealed``.
    """

    command: Sequence[str]
    make_ipe: Callable[[], Ipe]
    declared: Declared
    attach: Path | None = None
    audit_log: Path | None = None
    fail_on_deny: bool = False
    debug: bool = False
    volumes: "Sequence[VerifiedImage]" = ()
    sealable: Sequence[Place] = ()
    dm_verity_unsealed: bool = False


def run(options: RunOptions) -> int:
    """Run the command and return its exit status, or one of ours (see ``FAILED``, ``DENIED``).

    Reports on stderr what was denied. Must be called in the main thread of a process that has no others; without
    privileges, this process is in a user namespace of its own afterwards. CannotEmulateError where this machine cannot
    do it: nothing was started then. UserError where nothing is mounted that could be attached to.
    """
    command = Command.inherited(options.command)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would have the kernel reap what we wait for
    volumes = [_planned(number, image) for number, image in enumerate(options.volumes)]
    emulator: Emulator = (
        MountedEmulator(options.attach)
        if options.attach is not None
        else OwnEmulator(
            options.make_ipe,
            options.declared,
            {volume.name: image for volume, image in zip(volumes, options.volumes, strict=True)},
            options.sealable,
            options.dm_verity_unsealed,
        )
    )
    concealed = _runtime_directories()
    standing = footing.obtain(unshiftable=_unshiftable(options))
    blueprint = evolve(_blueprint(options, emulator, command, standing, concealed), volumes=volumes)
    for note in standing.notes:
        _say(note)
    if options.debug:
        _say(f"sandbox: root inside is {standing.kind.value}")
        for line in blueprint.describe():
            _say(f"sandbox: {line}")
    report = Report()
    status = FAILED
    try:
        with footing.own_pipes(standing), _sandbox(blueprint) as sandbox:
            status = _supervise(sandbox, emulator, report)
    except SignalledError as interrupted:
        return interrupted.status
    except NotJudgedError as error:
        report.failed(str(error))
    for line in report.lines(emulator.refusals):
        _say(line)
    if not report.all_judged:
        return FAILED
    return DENIED if options.fail_on_deny and report.denied_events else status


def _blueprint(
    options: RunOptions, emulator: Emulator, command: Command, standing: Footing, concealed: Sequence[Path]
) -> Blueprint:
    wanted = Wanted(
        verity=emulator.volumes,
        read_only=[options.audit_log.resolve()] if options.audit_log is not None else [],
        concealed=concealed,
        securityfs=emulator.securityfs,
        shield=standing.kind is Kind.SHIELDED,
        shift=standing.user_namespace if standing.kind is Kind.SHIFTED else None,
    )
    return Blueprint(
        steps=mount_plan.plan(wanted),
        own_securityfs=emulator.securityfs is None,
        user_namespace=standing.user_namespace,
        root=standing.root,
        shielded=standing.kind is Kind.SHIELDED,
        rules=hook.rules(securityfs=True, traps=emulator.traps),
        command=command,
    )


def _sandbox(blueprint: Blueprint) -> Sandbox:
    return Sandbox(functools.partial(agent.main, blueprint=blueprint), blueprint.root, blueprint.command.blocked)


def _supervise(sandbox: Sandbox, emulator: Emulator, report: Report) -> int:
    try:
        emulator.begin(sandbox, report)
        surroundings = sandbox.surroundings()
        judge, facts = emulator.attach(surroundings)
        exec_hook = hook.ExecHook(
            judge,
            facts,
            report,
            machine=surroundings.user_namespace,
            securityfs=surroundings.securityfs_device,
            superblocks=emulator.superblocks,
            traps=emulator.traps,
        )
        notifications = Notifications(exec_hook, Listener(sandbox.listener()), report, sandbox.kill)
        notifications.start()
        status = sandbox.wait()
        notifications.join()
        emulator.check()
    finally:
        sandbox.kill()
        emulator.end()
    return status


def _planned(number: int, image: "VerifiedImage") -> PlannedVolume:
    from ipe_emu.volumes import programs  # noqa: PLC0415 - most runs have no volumes

    directory = image.specification.directory
    if not directory.is_dir():
        raise UserError(f"--volume: {directory}: no such directory; make it first")
    return PlannedVolume(f"dm-{number}", directory.resolve(), image.kind, programs.needed(image.kind))


def _unshiftable(options: RunOptions) -> str | None:
    if options.attach is not None:
        return "the files of a mounted emulator"
    return "the files of volumes" if options.volumes else None


def _runtime_directories() -> list[Path]:
    """Where emulators have their control sockets: whoever reaches one changes what judges the tree.

    The one that an emulator would use is made if it is not there: it could come later.
    """
    with contextlib.suppress(UserError):
        make_runtime_directory()
    return [directory for directory in runtime_directories() if directory.is_dir()]


def _say(line: str) -> None:
    print(f"ipe-emu: {line}", file=sys.stderr, flush=True)
