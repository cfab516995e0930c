"""``ipe-emu boot``: an initramfs, from the kernel's execution of /init to the end of the machine."""

import contextlib
import functools
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from attrs import define, evolve, field, frozen

from ipe_emu.errors import CannotEmulateError, NotJudgedError
from ipe_emu.event import Subject
from ipe_emu.exec_hook import footing, hook
from ipe_emu.exec_hook.caller import Caller
from ipe_emu.exec_hook.channel import Channel, Message
from ipe_emu.exec_hook.execve import plan_execve, plan_execveat, read_path
from ipe_emu.exec_hook.footing import Kind
from ipe_emu.exec_hook.ima import Reported
from ipe_emu.exec_hook.keyctl import Keyctl
from ipe_emu.exec_hook.modules import Modules
from ipe_emu.exec_hook.overlays import Overlays
from ipe_emu.exec_hook.plan import Continue, Perform, Plan, Return
from ipe_emu.exec_hook.plan import Event as AskedEvent
from ipe_emu.exec_hook.sandbox import Sandbox, SignalledError
from ipe_emu.exec_hook.supervisor import Answering, Notifications, SecurityFsServer
from ipe_emu.exec_hook.traps import Trap
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.integrity.seals import Seals
from ipe_emu.integrity.sources import Combined, FactsSource
from ipe_emu.kernel_cmdline import parse_cmdline, words
from ipe_emu.linux import openat2, process, procfs, statx
from ipe_emu.linux.inotify import InodeWatch
from ipe_emu.linux.mountinfo import MountEntry, Superblocks
from ipe_emu.linux.process import SignalInfo
from ipe_emu.linux.seccomp import Listener
from ipe_emu.lsm import Decision
from ipe_emu.profiles import Profile
from ipe_emu.rehearse import cgroups, events
from ipe_emu.rehearse.block.device import BlockDevices
from ipe_emu.rehearse.block.probe import Probed
from ipe_emu.rehearse.blueprint import BootBlueprint
from ipe_emu.rehearse.cgroups import CgroupKeeper, WithoutCgroups
from ipe_emu.rehearse.console import Console
from ipe_emu.rehearse.disks import TEXT_FILES, Disks
from ipe_emu.rehearse.events import Event, Timeline
from ipe_emu.rehearse.facts import SuperblockFacts
from ipe_emu.rehearse.file_systems import KINDS, BlockFileSystems
from ipe_emu.rehearse.first_namespaces import FirstNamespaces
from ipe_emu.rehearse.image.open import Image
from ipe_emu.rehearse.init_arguments import InitArguments
from ipe_emu.rehearse.live import Live
from ipe_emu.rehearse.mounting import EVERY_MACHINE_HAS, FILE_SYSTEMS, Mounting, Staged
from ipe_emu.rehearse.power import Power
from ipe_emu.rehearse.release import Uname, release_of
from ipe_emu.rehearse.requests import Agent
from ipe_emu.rehearse.shell import DebuggingShell, Program
from ipe_emu.rehearse.staging import CGROUP2, DEVPTS, DEVTMPFS, PROC, ROOT, SECURITYFS, SYSFS, TEXTS
from ipe_emu.rehearse.statfs import Statfs
from ipe_emu.rehearse.verdict import fails
from ipe_emu.rehearse.watch import WatchedIpe

if TYPE_CHECKING:
    from ipe_emu.exec_hook.sealing import Sealing
    from ipe_securityfs.mount import Session

#: Calls that a kernel before 5.2 would not have: who mounts falls back to mount(2), which can be answered.
_ABSENT: Final = (
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "open_tree",
    "open_tree_attr",
    "move_mount",
    "mount_setattr",
)
#: How many pid namespaces below ours the machine's is: that of the keeper lies between.
_PID_DEPTH: Final = 2
#: The init process, as the machine sees it.
_PID_OF_INIT: Final = 1
#: How many file systems the machine gives, if its devpts is among them.
_WITH_DEVPTS: Final = 5
#: Where systemd is, which cannot be an init process without a hierarchy of cgroups.
_SYSTEMD: Final = (b"/usr/lib/systemd/systemd", b"/lib/systemd/systemd")
#: The level that a line written to /dev/kmsg may begin with.
_LEVEL: Final = re.compile(r"^<\d+>")
#: Where udev's daemon is.
_UDEV: Final = (b"/usr/lib/systemd/systemd-udevd", b"/lib/systemd/systemd-udevd", b"/lib/udev/udevd", b"/sbin/udevd")
#: How long the machine's processes may take to end once they are killed, in seconds.
_TIME_TO_DIE: Final = 10.0
#: Devices of this machine that every program may use.
_SHARED_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")


@frozen
class BootOptions:
    """What to boot, and how.

    ``make_ipe`` makes the booted emulator, which notes what happens in a timeline. ``cmdline`` is the kernel's.
    ``timeout`` is in seconds, None for no end.
    ``stop_at_switch_root`` ends the rehearsal where the init process executes a program of another root.
    ``then`` is a command that is run by a shell when it does, whose end is that of the rehearsal.
    A shell (``shell_program``) is opened for a person when the machine has come to its end (``shell_at_end``), and when
    something is denied or not judged for the first time (``shell_on_denial``).
    ``release`` is the kernel's, if the image says it.
    ``unshiftable`` says what the machine sees whose files cannot be given to other ids, if anything is. ``devices`` are
    the disks, ``probe`` finds what is on them.
    """

    profile: Profile
    make_ipe: Callable[[Timeline], WatchedIpe]
    image: Image
    cmdline: bytes
    timeout: float | None = None
    stop_at_switch_root: bool = False
    then: str | None = None
    shell_program: Program | None = None
    shell_at_end: bool = False
    shell_on_denial: bool = False
    release: str | None = None
    unshiftable: str | None = None
    devices: BlockDevices = field(factory=BlockDevices)
    probe: Callable[[], Mapping[str, Probed]] = field(default=dict)


def boot(options: BootOptions, timeline: Timeline, say: Callable[[str], None]) -> WatchedIpe:
    """Boot the image, until its machine ends, and return the model as it is then.

    What happens is in ``timeline``, and remarks go to ``say``.

    Must be called in the main thread of a process that has no others; without privileges, this process is in a user
    namespace of its own afterwards. CannotEmulateError where this machine cannot do it: nothing was started then.
    SignalledError if a signal made an end, NotJudgedError if the emulator itself came to one.
    """
    init = InitArguments.of(options.cmdline)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would have the kernel reap what we wait for
    standing = footing.obtain(own_files=True, unshiftable=options.unshiftable)
    for note in standing.notes:
        say(note)
    ours, theirs = Channel.pair()
    our_orders, their_orders = Channel.pair()
    console = Console(standing.root)
    rehearsal = _Rehearsal(options, timeline, standing.root, standing.kind is Kind.SHIELDED, Agent(ours), console)
    blueprint = BootBlueprint(
        user_namespace=standing.user_namespace,
        root=standing.root,
        rules=hook.rules(securityfs=True, traps=rehearsal.traps, absent=_ABSENT),
        init=init,
        image=options.image,
    )

    def be_agent(channel: Channel, supervisor: int, ending: int) -> NoReturn:
        try:
            ours.close()
            our_orders.close()
            console.close()
            # Here, beside the supervisor, which imports the securityfs meanwhile and has no use for it.
            from ipe_emu.rehearse import agent  # noqa: PLC0415 - only where it is needed: slow

            agent.main(channel, supervisor, ending, requests=theirs, orders=their_orders, blueprint=blueprint)
        except Exception as error:
            channel.report_failure(error)
        finally:
            os._exit(0)

    blocked = [signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
    with contextlib.closing(console), CgroupKeeper() as groups, Sandbox(be_agent, standing.root, blocked) as sandbox:
        theirs.close()
        their_orders.close()
        rehearsal.orders = our_orders
        rehearsal.groups = groups
        return rehearsal.run(sandbox)


@define(eq=False)
class _Rehearsal:
    """One boot: its parts, and the threads that answer."""

    options: BootOptions
    timeline: Timeline
    root: int
    shielded: bool
    agent: Agent
    console: Console
    superblocks: Superblocks = field(factory=Superblocks, init=False)
    facts: SuperblockFacts = field(factory=SuperblockFacts, init=False)
    known: Overlays = field(init=False)
    mounting: Mounting = field(init=False)
    uname: Uname = field(init=False)
    modules: Modules = field(factory=Modules, init=False)
    disks: Disks = field(init=False)
    sealing: "Sealing | None" = field(default=None, init=False)
    file_systems: BlockFileSystems = field(init=False)
    keyctl: Keyctl = field(factory=Keyctl, init=False)
    power: Power = field(init=False)
    first_namespaces: FirstNamespaces = field(factory=FirstNamespaces, init=False)
    shell: DebuggingShell = field(init=False)
    orders: Channel = field(init=False)
    groups: CgroupKeeper = field(init=False)
    _ipe: WatchedIpe = field(init=False)
    _answering: Answering = field(init=False)
    _commands: list[Notifications] = field(factory=list, init=False)
    _sandbox: Sandbox = field(init=False)
    _init: int = field(default=-1, init=False)
    _init_pid: int = field(default=0, init=False)
    _ended: bool = field(default=False, init=False)
    _switched: bool = field(default=False, init=False)
    _killed: float | None = field(default=None, init=False)
    _looked_at_denial: bool = field(default=False, init=False)
    _refusals_before: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.power = Power(self._end)
        self.console.on_log = lambda line: self._log(_LEVEL.sub("", line))
        self.console.on_sysrq = self.power.sysrq
        self.console.on_escape = lambda: os.kill(os.getpid(), signal.SIGINT)
        self.timeline.subscribe(Live(self.console.say, coloured=os.isatty(2)).tell)
        self.shell = DebuggingShell(self.options.shell_program, self.timeline, self.console, lambda: self.orders)
        if self.options.shell_on_denial:
            self.timeline.subscribe(self._look_at_denial)
        devices = self.options.devices
        self.file_systems = BlockFileSystems(devices, self.agent, self.superblocks, self.facts.by_device, _PID_DEPTH)
        known: FactsSource = self.facts
        on_disks = {}
        if any(devices):
            known = Combined([self.facts, self._seals()])
            on_disks = dict.fromkeys(KINDS, self.file_systems)
        self.known = Overlays(known, known, self.superblocks)
        devices.refresh = self.file_systems.look_after
        emulators = {**EVERY_MACHINE_HAS, **on_disks}
        nullfs = self.options.profile.nullfs
        self.mounting = Mounting(self.agent, self.timeline, emulators, self.superblocks, nullfs)
        self.uname = Uname(self.agent)
        self.disks = Disks(
            devices,
            self.options.profile,
            self.keyctl.session_keys,
            lambda: self._ipe.keyrings,
            self.agent,
            self,
            self.options.probe,
            parse_cmdline(self.options.cmdline).dm_verity_require_signatures,
        )
        self.disks.facts_changed = self.file_systems.take_facts
        self.file_systems.not_judged = self.not_judged

    @property
    def traps(self) -> Sequence[Trap]:
        """Every system call that is answered here beside those that the exec hook judges."""
        return (
            *self.mounting.traps,
            *self.power.traps,
            *self.disks.traps,
            *(() if self.sealing is None else self.sealing.traps),
            *self.keyctl.traps,
            *self.uname.traps,
            *Statfs(self.mounting.devices).traps,
            *self.first_namespaces.traps,
            Trap("execve", functools.partial(self._plan_execve, plan_execve, 0)),
            Trap("execveat", functools.partial(self._plan_execve, plan_execveat, 1)),
            *self._exits,
        )

    @property
    def _exits(self) -> Sequence[Trap]:
        """What a machine that somebody wants to look at in the end must not get through with."""
        if not self.options.shell_at_end:
            return ()
        return (Trap("exit_group", self._plan_exit_group), Trap("exit", self._plan_exit))

    def run(self, sandbox: Sandbox) -> WatchedIpe:
        """Prepare the machine, start it, and wait for its end."""
        self._sandbox = sandbox
        server = SecurityFsServer(self, sandbox.kill)
        server.start()
        try:
            self._ipe = ipe = self.options.make_ipe(self.timeline)
            ipe.spares = self.shell.spares
            unsealed = parse_cmdline(self.options.cmdline).dm_verity_keyring_unsealed
            self.keyctl.begin(ipe, self.root, dm_verity_unsealed=unsealed)
            fuse = sandbox.expect("fuse")
            self._init = sandbox.expect("init").fds[0]
            self._init_pid = self.first_namespaces.init = process.pid_of(self._init)
            machine = self._machine()
            self._note_start(ipe, machine)
            user_namespace = machine.values["user_namespace"]
            device = fuse.values["device"]
            self._know_root(machine)
            self._make_group()
            self.uname.release = release_of(ipe.profile, self.options.release, machine.values["modules"])
            server.serve_session(
                fuse.fds[1],
                functools.partial(_session, self, ipe, (fuse.fds[0], fuse.fds[1]), user_namespace, device),
            )
            self._stage(machine, device)
            self.disks.devtmpfs = self.mounting.devices[DEVTMPFS]
            self.disks.nodes.sysfs = self.mounting.devices[SYSFS]
            self.disks.furnish(has_udev=self._has(_UDEV))
            self._serve_nodes(machine)
            exec_hook = hook.ExecHook(
                ipe,
                self.known,
                self,
                machine=user_namespace,
                pid_depth=_PID_DEPTH,
                securityfs=device,
                traps=self.traps,
                superblocks=self.superblocks,
                modules=self.modules,
                every_event=True,  # for the timeline
            )
            self._answering = Answering(exec_hook)
            notifications = Notifications(self._answering, Listener(sandbox.listener()), self, sandbox.kill)
            notifications.start()
            with self.console.running():
                self._watch()
                if self.options.then is not None and not any(
                    isinstance(event, events.CommandEnded) for event in self.timeline.events
                ):
                    self._command_ended(None)
                sandbox.kill()
                notifications.join()
                for command in self._commands:
                    command.join()
                self.file_systems.finish()
                self.disks.finish()
        finally:
            sandbox.kill()
            self.agent.close()
            self.orders.close()
            server.stop()
            server.join()
        return ipe

    def _seals(self) -> FactsSource:
        """Have the files known that are sealed on disks, and the calls answered that ask for their seals."""
        from ipe_emu.exec_hook.sealing import Sealing  # noqa: PLC0415 - most boots have no disks
        from ipe_emu.volumes.ext4_seals import ImageSeals  # noqa: PLC0415 - as above

        seals = ImageSeals(self._verify_fsverity, self.file_systems.recheck)
        self.file_systems.seals = seals
        self.sealing = Sealing(Seals(InodeWatch()), (), self._verify_fsverity, seals)
        return seals

    def _verify_fsverity(self, digest: Digest, signature: bytes) -> None:
        self._ipe.verify_fsverity_signature(digest, signature)

    # -- before it starts -------------------------------------------------------------------------------------------

    def _machine(self) -> Message:
        message = self._sandbox.next(self._sandbox.interrupt)
        if message.kind == "not-judged":
            raise NotJudgedError(message.values["why"])
        if message.kind != "machine":
            raise CannotEmulateError(f"the machine cannot be made: {message.values.get('why', message.kind)}")
        return message

    def _note_start(self, ipe: WatchedIpe, machine: Message) -> None:
        active = ipe.active
        policy = None if active is None else active.policy
        cmdline = os.fsdecode(self.options.cmdline)
        self.timeline.add(events.Started(0.0, None, ipe.profile.name, cmdline, policy, ipe.enforce))
        image = machine.values["image"]
        self.timeline.add(
            events.ImageUnpacked(
                0.0,
                None,
                **{**image, "left_out": tuple(image["left_out"]), "differences": tuple(image["differences"])},
            )
        )

    def _know_root(self, machine: Message) -> None:
        """The first root is the initramfs's for good, whether anybody still sees it or not."""
        device = machine.values["device"]
        number = f"{os.major(device)}:{os.minor(device)}"
        mount = machine.values["mount"]
        self.superblocks.names[number] = "rootfs"
        self.superblocks.mounts[mount] = MountEntry(mount, number, b"/", b"/", "tmpfs", b"rootfs")
        self.facts.by_device[number] = Facts(boot_verified=True)
        self.mounting.root_mount = mount

    def _make_group(self) -> None:
        """Have the machine in a group of its own, if there may be a systemd in it."""
        if not any(self.options.devices) and not self._has(_SYSTEMD):
            return
        emulators = dict(self.mounting.emulators)
        try:
            self.groups.make(self.root, self._init_pid)
            del emulators[CGROUP2.name]  # this machine's kernel mounts it
        except CannotEmulateError as error:
            emulators[CGROUP2.name] = WithoutCgroups(str(error), emulators[CGROUP2.name], self._give_up)
        self.mounting.emulators = emulators

    def _give_up(self, subject: Subject, call: str, reason: str) -> None:
        """End the rehearsal, for a machine that cannot go on as it would."""
        self.not_judged(subject, call, reason)
        self._kill()

    def _stage(self, machine: Message, securityfs: int) -> None:
        """Give the agent what the machine made for it, and complete that."""
        uevents, *staged = machine.fds
        self.disks.uevents.begin(uevents, self.root)
        if len(staged) == _WITH_DEVPTS:
            self.mounting.emulators = {**self.mounting.emulators, "devpts": Staged(DEVPTS)}
        for path, fd in zip((DEVTMPFS, SYSFS, PROC, ROOT, DEVPTS), staged, strict=False):
            self.mounting.devices[path] = os.fstat(fd).st_dev
            self.agent.stage(fd, path)
            os.close(fd)
        self.mounting.devices[SECURITYFS] = securityfs
        for name in _SHARED_DEVICES:
            self.agent.bind(Path("/dev") / name, DEVTMPFS / name)
        self.agent.bind(self.console.console.path, DEVTMPFS / "console")
        self.agent.bind(self.console.kmsg.path, DEVTMPFS / "kmsg")
        self.mounting.proc_parts += [
            (TEXTS / name, name) for name in ("cgroups", "cmdline", "filesystems", "keys", *TEXT_FILES)
        ]
        if Path("/proc/modules").exists():  # this machine's own, which modprobe would take for loaded
            self.mounting.proc_parts.append((TEXTS / "modules", "modules"))
        if Path("/proc/sysrq-trigger").exists():
            self.mounting.proc_parts.append((self.console.sysrq.path, "sysrq-trigger"))
        if self.shielded:
            # Its root is root of this machine, as far as files are concerned.
            self.mounting.proc_parts += [(None, name) for name in procfs.CONTROLS if name != "sysrq-trigger"]

    def _has(self, paths: Sequence[bytes]) -> bool:
        """Whether the image has one of these files."""
        root = os.open(f"/proc/{self._init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for path in paths:
                with contextlib.suppress(OSError):
                    os.close(openat2.open_path(root, path, openat2.RESOLVE_IN_ROOT))
                    return True
            return False
        finally:
            os.close(root)

    def _serve_nodes(self, machine: Message) -> None:
        """Have the device nodes of the image lead to what stands for them."""
        root = os.open(f"/proc/{self._init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for paths, mode, number in machine.values["nodes"]:
                source = self.disks.stands_for(mode, number)
                for path in paths:
                    target = openat2.open_path(root, os.fsencode(path), openat2.RESOLVE_IN_ROOT)
                    try:
                        self.agent.attach(self._init_pid, target, source)
                    finally:
                        os.close(target)
        finally:
            os.close(root)

    # -- while it runs ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Start the init process, and wait for its end or for that of the time it is given."""
        self.timeline.start()
        self._sandbox.tell("start")
        while True:
            try:
                message = self._sandbox.next(self._interrupt, self._time_left())
            except TimeoutError:
                if self._killed is not None:  # and still there: the sandbox's end will do
                    return
                if not self.shell.is_open:
                    self.timeline.add(events.TimedOut(self.timeline.now, None, self.options.timeout or 0.0))
                    self._over("the machine's time is over")
                continue
            if message.kind == "ended":
                self._init_ended(message.values["status"])
                return
            self._take(message)

    def _take(self, message: Message) -> None:
        match message.kind:
            case "log":
                self._log(message.values["text"])
            case "panic":
                self._panic(message.values["text"])
                self._over("the machine is over, for it has no init process")
            case "no-init":
                self._no_init(message.values["path"])
                self._over("the machine is over, for its image has no init")
            case "command-listener":
                if message.values["name"] == "shell":
                    self.shell.begins(message.values["pid"])
                command = Notifications(self._answering, Listener(message.fds[0]), self, self._sandbox.kill)
                self._commands.append(command)
                command.start()
                self._sandbox.tell("go")
            case "command-ended":
                if not self._ended:
                    self._command_ended(message.values["status"])
                    self._over("the command has ended, and the machine")
            case "shell-ended":
                self._shell_ended()
            case _:
                raise NotJudgedError(f"the machine failed: {message.values.get('why', message.kind)}")

    def _init_ended(self, status: int) -> None:
        if not self._ended:
            if self.options.shell_at_end:
                self.console.say("ipe-emu: no shell: the init process died, and the whole machine with it")
            self._panic(f"Attempted to kill init! exitcode=0x{status:08x}")

    def _time_left(self) -> float | None:
        """How long to wait for what comes next, in seconds: no timeout while a person looks around."""
        if self._killed is not None:
            return max(0.0, self._killed + _TIME_TO_DIE - time.monotonic())
        if self.options.timeout is None or self.shell.is_open:
            return None
        return max(0.0, self.options.timeout - self.timeline.now)

    def _interrupt(self, received: SignalInfo) -> None:
        try:
            self._sandbox.interrupt(received)
        except SignalledError:
            if not self._ended:
                raise
            self._kill()  # the shell that was opened at the end; what the boot came to is known

    def _plan_execve(
        self, plan_call: Callable[..., Plan], path: int, caller: Caller, args: tuple[int, ...]
    ) -> Plan | None:
        """See the init process execute a program of another root than the first; ``path`` is which argument it is."""
        if self._switched or caller.tracee.pid != self._init_pid:
            return None
        root = caller.tracee.open_root()
        try:
            if statx.mount_id(root) == self.mounting.root_mount:
                return None
        finally:
            os.close(root)
        plan = plan_call(caller, args, self._ipe.profile)
        if not isinstance(plan.answer, Continue):
            return plan
        program = os.fsdecode(read_path(caller.tracee, args[path]))
        subject = caller.subject
        if self.options.stop_at_switch_root:
            return evolve(plan, answer=Perform(lambda: self._switch_root(program, subject)))
        return evolve(plan, answer=Continue(lambda: self._switch_root(program, subject)))

    def _switch_root(self, program: str, subject: Subject) -> int:
        self._switched = True
        self.timeline.add(events.SwitchedRoot(self.timeline.now, subject, program))
        if self.options.stop_at_switch_root:
            self._over("the machine is in its next root")
        if self.options.then is not None:
            self.orders.send("command", {"text": self.options.then}, [self.console.console.theirs])
        return 0

    def _command_ended(self, status: int | None) -> None:
        code = status
        if status is not None:
            code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.timeline.add(events.CommandEnded(self.timeline.now, None, self.options.then or "", code))

    def _end(self, how: str, means: str, caller: Caller | None) -> None:
        """The machine was told to end."""
        if not self._ended:
            by = caller.subject if caller is not None else None
            self.timeline.add(events.Rebooted(self.timeline.now, by, how, means))
            self._over(f"the machine is {how}")
        elif self.shell.is_open:  # who types this there has seen enough
            self._kill()

    def _over(self, why: str) -> None:
        """The machine has come to its end; what is said of ``why`` begins a sentence."""
        self._ended = True
        if self.options.shell_at_end and self._open_shell(why, "Leave it (exit) to see the report."):
            return
        self._kill()

    def _kill(self) -> None:
        # Its processes go before what serves them does, or they would meet errors that are none.
        self._ended = True
        self._killed = self._killed or time.monotonic()
        process.send_signal(self._init, signal.SIGKILL)

    # -- a shell to look at it ----------------------------------------------------------------------------------------

    def _open_shell(self, why: str, leaving: str) -> bool:
        self._refusals_before = len(self._ipe.upstream_refusals)
        return self.shell.open(why, leaving)

    def _look_at_denial(self, event: Event) -> None:
        """Open a shell where something is denied for the first time; its caller is stopped as it comes back."""
        if self._looked_at_denial or not fails(event) or self._ended:
            return
        self._looked_at_denial = True
        if self._open_shell("the machine was denied something", "Leave it (exit) to let the machine go on."):
            self.timeline.add(events.ShellOpened(self.timeline.now, None))

    def _shell_ended(self) -> None:
        del self._ipe.upstream_refusals[self._refusals_before :]
        self.shell.ended(go_on=not self._ended)
        if self._ended:
            self._kill()

    def _plan_exit_group(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """See the init process end, which would take the whole machine with it, and keep it from it."""
        if self._ended or caller.tracee.status.tgid != self._init_pid:
            return None
        return Plan(Return(0, then=lambda: self._init_ends((args[0] & 0xFF) << 8)))

    def _plan_exit(self, caller: Caller, args: tuple[int, ...]) -> Plan | None:
        """The same, where a thread ends: if it is the only one, the process does."""
        if sum(1 for _ in Path(f"/proc/{self._init_pid}/task").iterdir()) > 1:
            return None
        return self._plan_exit_group(caller, args)

    def _init_ends(self, status: int) -> None:
        self._panic(f"Attempted to kill init! exitcode=0x{status:08x}")
        self._over("the machine is over, for its init process has ended")

    def log(self, text: str) -> None:
        """Note a line of the kernel's log."""
        self._log(text)

    def remark(self, text: str) -> None:
        """Note what is done otherwise than by a kernel."""
        self.not_done(None, "ioctl", text)

    def restart(self, means: str) -> None:
        """The kernel restarts the machine by itself."""
        self._end(events.RESTARTED_ITSELF, means, None)

    def panic(self, text: str) -> None:
        """The kernel gives up."""
        if not self._ended:
            self._panic(text)
            self._kill()

    def _log(self, text: str) -> None:
        self.timeline.add(events.Message(self.timeline.now, None, text))

    def _panic(self, text: str) -> None:
        if not self._ended:
            self._ended = True
            self.timeline.add(events.Panicked(self.timeline.now, None, text))

    def _no_init(self, path: str) -> None:
        """What ``prepare_namespace()`` does where the initramfs has no init: it mounts the root that root= names."""
        if any(word.startswith(b"root=") for word in words(self.options.cmdline)):
            self._ended = True
            reason = f"the image has no {path}: a kernel would mount what root= says, which is not emulated"
            self.timeline.add(events.NotJudged(self.timeline.now, None, "boot", reason))
        else:
            self._log(f"check access for rdinit={path} failed: -2, ignoring")
            self._panic('VFS: Unable to mount root fs on "" or unknown-block(0,0)')

    # -- what the exec hook reports (hook.Observer, supervisor.Failures) ----------------------------------------------

    def denied(self, event: AskedEvent, decision: Decision) -> bool:  # noqa: ARG002 - the timeline has it already
        """Keep an init process that is to die of it, for whoever wants to look at its machine."""
        if not event.after_point_of_no_return or event.subject.pid != _PID_OF_INIT:
            return False
        if not self.shell.is_open and not self.options.shell_at_end:
            return False
        self._panic(f"Attempted to kill init! exitcode=0x{signal.SIGSEGV:08x}")
        if not self.shell.is_open:
            self._over("the machine is over, for its init process is killed")
        return True

    def not_judged(self, subject: Subject | None, call: str, reason: str) -> None:
        """Note a call that could not be judged."""
        self.timeline.add(events.NotJudged(self.timeline.now, subject, call, reason))

    def not_done(self, subject: Subject | None, call: str, what: str) -> None:
        """Note a call that returned success without being carried out."""
        self.timeline.add(events.NotDone(self.timeline.now, subject, call, what))

    def failed(self, what: str) -> None:
        """Note that a part of the emulator failed."""
        self.timeline.add(events.Failed(self.timeline.now, None, what))


def _session(
    rehearsal: _Rehearsal, ipe: WatchedIpe, fuse: tuple[int, int], user_namespace: int, device: int
) -> "Session":
    from ipe_securityfs.clients import Credentials  # noqa: PLC0415 - slow; this is another thread
    from ipe_securityfs.mount import Session  # noqa: PLC0415 - as above
    from ipe_securityfs.operations import MountedAs  # noqa: PLC0415 - as above
    from ipe_securityfs.tree import Owner  # noqa: PLC0415 - as above

    descriptor, root = fuse
    mounted_as = MountedAs(
        Credentials(frozenset({user_namespace})),
        rehearsal.known,
        removable_at=f"/proc/self/fd/{root}/{SECURITYFS.name}",
        device=device,
        pid_level=_PID_DEPTH,
        size_trick=False,  # the exec hook answers sendfile(2)
        superblocks=rehearsal.superblocks,
        names_writers=True,
    )
    owner = Owner(rehearsal.root, rehearsal.root)
    session = Session(
        ipe, f"/dev/fd/{descriptor}", mounted_as, owner=owner, beside_others=True, ima=Reported(rehearsal)
    )
    if session.subtrees is not None:
        session.subtrees.add_text(b"cmdline", lambda: rehearsal.options.cmdline + b"\n")
        session.subtrees.add_text(b"cgroups", cgroups.controllers)
        session.subtrees.add_text(b"keys", rehearsal.keyctl.proc_keys)
        rehearsal.disks.serve(session.subtrees, root, device)
        session.subtrees.add_text(b"modules", rehearsal.modules.listing)
        rehearsal.file_systems.serve(session.subtrees, root)
        listed = [*FILE_SYSTEMS, *(f"\t{kind}\n" for kind in KINDS if kind in rehearsal.mounting.emulators)]
        session.subtrees.add_text(b"filesystems", lambda: "".join(listed).encode())
    return session
