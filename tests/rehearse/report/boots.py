"""Boots as lists of events, as an emulated machine tells of them."""

from collections.abc import Iterable
from errno import EACCES

from ipe_emu.event import File, Hook, Subject
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.lsm import Decision
from ipe_emu.policy.evaluate import evaluate
from ipe_emu.policy.index import RuleIndex
from ipe_emu.policy.parse import parse_policy
from ipe_emu.policy.rule import Action, Operation, Policy
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event

ROOT_HASH = Digest("sha256", bytes(range(32)))
OTHER_HASH = Digest("sha256", bytes(32))
BOOT_TEXT = b"""policy_name=AllowInitramfs policy_version=0.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
op=POLICY boot_verified=TRUE action=ALLOW
"""
FINAL_TEXT = f"""policy_name=Lockdown policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE dmverity_roothash={ROOT_HASH} action=ALLOW
""".encode()
BOOT = parse_policy(BOOT_TEXT)
FINAL = parse_policy(FINAL_TEXT)

KERNEL = Subject(1, b"swapper/0")
INIT = Subject(1, b"init")
CAT = Subject(17, b"cat")
SHELL = Subject(12, b"sh")

INITRAMFS = Facts(boot_verified=True)
VOLUME = Facts(dmverity_roothash=ROOT_HASH)
OTHER_VOLUME = Facts(dmverity_roothash=OTHER_HASH)


def judged(
    when: float,
    path: bytes,
    facts: Facts,
    policy: Policy | None,
    *,
    by: Subject = SHELL,
    dev: str = "rootfs",
    hook: Hook = Hook.BPRM_CHECK,
    operation: Operation = Operation.EXECUTE,
    enforce: bool = True,
) -> events.Judged:
    """What a policy says of a file."""
    verdict = None if policy is None else evaluate(RuleIndex(policy), operation, facts)
    denied = enforce and verdict is not None and verdict.action is Action.DENY
    return events.Judged(
        when, by, operation, hook, File(path, dev, 7, facts), Decision(EACCES if denied else 0, verdict)
    )


def started(policy: Policy | None = BOOT, *, cmdline: str = "quiet", enforce: bool = True) -> events.Started:
    return events.Started(0.0, None, "op-policy", cmdline, policy, enforce)


def failed(
    errno: int,
    node: str = "new_policy",
    *,
    when: float = 0.2,
    size: int = 1500,
    head: bytes = b"\x30\x82\x05\xd8",
    reason: str = "",
    by: Subject = CAT,
) -> events.ControlFailed:
    return events.ControlFailed(when, by, node, errno, reason, size, head)


def initramfs_phase() -> list[Event]:
    return [
        started(),
        events.ImageUnpacked(0.0, None, 12, 2_000_000),
        judged(0.001, b"/init", INITRAMFS, BOOT, by=KERNEL),
        judged(0.002, b"/bin/busybox", INITRAMFS, BOOT, by=INIT),
        *(judged(0.01 + n * 0.004, b"/bin/busybox", INITRAMFS, BOOT) for n in range(12)),
        events.Message(0.09, None, "device-mapper: verity: sha256 using shash"),
    ]


def good_boot() -> list[Event]:
    """The unsigned flow: load, activate, delete, switch root, and a program in /tmp that is denied at last."""
    return [
        *initramfs_phase(),
        judged(0.1, b"/bin/busybox", INITRAMFS, BOOT, by=CAT, operation=Operation.POLICY, hook=Hook.POLICY_LOAD),
        events.PolicyLoaded(0.101, CAT, FINAL, FINAL_TEXT, signed=False, updated=False),
        events.PolicyActivated(0.12, SHELL, FINAL, "AllowInitramfs"),
        events.PolicyDeleted(0.125, SHELL, "AllowInitramfs"),
        events.SwitchedRoot(0.15, INIT, "/sbin/init"),
        *(judged(0.151 + n * 0.01, b"/usr/bin/app", VOLUME, FINAL, dev="dm-0") for n in range(8)),
        events.Rebooted(0.4, INIT, "powered off", "reboot(2)"),
    ]


def with_denial(*denials: Event) -> list[Event]:
    """The good boot, with something that goes wrong before its end."""
    return sorted([*good_boot(), *denials], key=lambda event: event.when)


def without_loading(*instead: Event, switch: bool = False) -> list[Event]:
    """A boot whose loader fails."""
    switched: Iterable[Event] = [events.SwitchedRoot(0.3, INIT, "/sbin/init")] if switch else []
    return [*initramfs_phase(), *instead, *switched, events.Rebooted(0.4, INIT, "powered off", "reboot(2)")]


def hostile_boot() -> list[Event]:
    """Names that would like to be something else."""
    name = b"/tmp/<script>alert(1)</script>\x1b[2J\n\"'&\xff\xe2\x80\xae"
    return [
        started(cmdline="</style><img src=x onerror=alert(1)> \x07"),
        judged(0.1, name, NO_FACTS, BOOT, by=Subject(3, b"</title>\x1b]0;x\x07"), dev="<b>"),
        events.Message(0.2, None, "<svg onload=alert(1)>\x1b[31m"),
        events.NotJudged(0.3, Subject(4, b"&lt;"), "open<i>", "\u202ereversed"),
        failed(74, "policies/<x>/update", reason="<u>\n</u>"),
    ]
