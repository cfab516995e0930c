"""Rules of IMA: which ones every kernel takes, which ones none does, and which ones are not judged."""

import errno
from collections.abc import Callable

import pytest
from attrs import define, field

from ipe_emu.audit import AuditRecord
from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.event import File, Subject
from ipe_emu.ima import LONGEST_WRITE, ImaPolicy, check_rules
from ipe_emu.integrity.facts import NO_FACTS
from ipe_emu.keyring import Keyrings
from ipe_emu.lsm import Decision, Ipe, Opener, Writer

pytestmark = pytest.mark.timeout(20)

SUBJECT = Subject(7, b"loader")


@define
class Told:
    """What the report would say."""

    denials: list[bytes] = field(factory=list)
    unjudged: list[str] = field(factory=list)
    undone: list[str] = field(factory=list)

    def denied(self, subject: Subject, file: File, decision: Decision) -> None:
        self.denials.append(file.path)

    def not_judged(self, subject: Subject, call: str, reason: str) -> None:
        self.unjudged.append(reason)

    def not_done(self, subject: Subject, call: str, what: str) -> None:
        self.undone.append(what)


@define
class Machine:
    """A node, whose writer may read one file."""

    content: bytes = b"audit\n"
    rules: str = "DEFAULT action=ALLOW"
    enforce: bool = True
    told: Told = field(factory=Told)
    paths: list[bytes] = field(factory=list)
    records: list[AuditRecord] = field(factory=list)

    def write(self, data: bytes) -> int:
        ipe = Ipe(Keyrings(), self.records.append, enforce=self.enforce)
        ipe.load_boot_policy(f"policy_name=test policy_version=0.0.1\n{self.rules}\n".encode())
        writer = Writer(Opener(cap_mac_admin=False), SUBJECT, read_policy_file=self._read)
        return ImaPolicy(ipe, self.told).write(data, writer)

    def _read(self, path: bytes) -> tuple[File, bytes]:
        self.paths.append(path)
        return File(path, "rootfs", 1, NO_FACTS), self.content


def answer(function: Callable[[], object]) -> object:
    try:
        return function()
    except KernelError as error:
        return error.name


@pytest.mark.parametrize(
    ("content", "rules"),
    [
        (b"\n", 0),
        (b"# dont_measure\n\n \t# appraise\n", 0),
        (b"dont_measure fsmagic=0x9fa0\n", 1),
        (b"\tmeasure\tfunc=MMAP_CHECK  mask=MAY_EXEC uid=0\n", 1),
        (b"measure func=FILE_CHECK mask=^MAY_READ euid>1000 fowner<5\n#\naudit fsname=ext4\n", 2),
        (b"dont_hash fsuuid=6CE1A2F1-9e3c-4d0f-8a5e-0123456789ab\ndont_appraise gid=4 fgroup=4\n", 2),
    ],
)
def test_what_every_kernel_takes(content: bytes, rules: int) -> None:
    assert check_rules(content) == rules


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"audit",  # the kernel counts a newline that is not there
        b"audit\n# the end",
        b"neither a module nor a kernel\n",
        b"fsmagic=0x9fa0\n",  # no action
        b"audit measure\n",
        b"audit=1\n",
        b"audit func\n",
        b"audit func=\n",
        b"audit func>FILE_CHECK\n",
        b"audit\nnonsense\n",
        b"audit\r\n",
    ],
)
def test_what_no_kernel_takes(content: bytes) -> None:
    with pytest.raises(KernelError) as refused:
        check_rules(content)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "content",
    [
        b"appraise func=MODULE_CHECK appraise_type=imasig\n",  # would deny modules
        b"audit # from 7.0 on this is a comment\n",
        b"audit # fsmagic\n",
        b"measure fsmagic=0x10000000000000000 nonsense\n",  # ERANGE, as it is
        b"dont_audit\n",
        b"dont_audit\naudit",
        b"measure func=KEY_CHECK keyrings=.ima\n",
        b"measure func=NO_SUCH\n",
        b"measure uid=0 euid=0\n",
        b"measure uid=4294967296\n",
        b"measure subj_type=unconfined_t\n",
        b"audit\n\0\n",
        b"audit\n" * 400_000,
    ],
)
def test_what_is_not_judged(content: bytes) -> None:
    with pytest.raises(NotJudgedError):
        check_rules(content)


#: What Linux 6.12.117 and 7.3.4 with IMA (CONFIG_IMA_WRITE_POLICY, in user mode) returned for the path of such a file.
OF_A_KERNEL = {
    b"dont_measure fsmagic=0x9fa0\naudit func=BPRM_CHECK mask=MAY_EXEC uid=0\n": 0,
    b"measure func=MMAP_CHECK mask=^MAY_READ euid>1000 fowner<5\n": 0,
    b"dont_hash fsuuid=6ce1a2f1-9e3c-4d0f-8a5e-0123456789ab\n\thash gid=4 fgroup=4\n": 0,
    b"dont_appraise func=PATH_CHECK fsname=ext4\n": 0,
    b"dont_measure func=CREDS_CHECK egid<3\n": 0,
    b"audit  uid>5 \n": 0,
    b"audit func=KEXEC_INITRAMFS_CHECK\naudit func=KEXEC_KERNEL_CHECK\naudit func=POLICY_CHECK\n": 0,
    b"audit func=FILE_MMAP\naudit func=FIRMWARE_CHECK\naudit func=MODULE_CHECK\n": 0,
    b"# a\n\n": 0,
    b"audit": errno.EINVAL,
    b"# a\naudit": errno.EINVAL,
    b"audit\nnonsense\n": errno.EINVAL,
    b"audit=1\n": errno.EINVAL,
    b"audit func=\n": errno.EINVAL,
    b"audit func>FILE_CHECK\n": errno.EINVAL,
    b"audit measure\n": errno.EINVAL,
    b"fsmagic=1\n": errno.EINVAL,
    b"audit\r\n": errno.EINVAL,
    b"audit fsmagic\n": errno.EINVAL,
}


@pytest.mark.parametrize("content", OF_A_KERNEL)
def test_what_a_kernel_answered(content: bytes) -> None:
    machine = Machine(content)
    number = OF_A_KERNEL[content]
    assert answer(lambda: machine.write(b"/p")) == (errno.errorcode[number] if number else 2)
    assert not machine.told.unjudged


def test_a_path_is_read_and_ipe_asked() -> None:
    machine = Machine(b"audit\nmeasure\n", "DEFAULT action=ALLOW")
    assert machine.write(b"/etc/ima.pol\nand more") == len(b"/etc/ima.pol\nand more")
    assert machine.paths == [b"/etc/ima.pol"]
    assert machine.told == Told(undone=["2 rule(s) of IMA are not in force"])


def test_a_denied_file_is_read_by_nobody() -> None:
    machine = Machine(rules="DEFAULT action=ALLOW\nop=POLICY action=DENY")
    assert answer(lambda: machine.write(b"/etc/ima.pol")) == "EACCES"
    assert machine.told == Told(denials=[b"/etc/ima.pol"])
    assert b"ipe_op=POLICY ipe_hook=KERNEL_READ" in machine.records[0].text


def test_permissive_mode_records_and_reads() -> None:
    machine = Machine(rules="DEFAULT action=DENY", enforce=False)
    assert machine.write(b"/etc/ima.pol") == 12
    assert len(machine.records) == 1


def test_rules_of_a_denied_file_do_not_matter() -> None:
    machine = Machine(b"appraise\n", "DEFAULT action=DENY")
    assert answer(lambda: machine.write(b"/p")) == "EACCES"
    assert not machine.told.unjudged


def test_what_is_not_judged_is_told_and_fails() -> None:
    machine = Machine(b"appraise\n")
    assert answer(lambda: machine.write(b"/p")) == "EINVAL"
    assert machine.told.unjudged == ["IMA is not emulated, and 'appraise' depends on it"]
    assert not machine.told.undone


@pytest.mark.parametrize(
    ("data", "taken"),
    [
        (b"audit\n", 6),
        (b"audit\nmeasure\n", 6),  # one line at a time
        (b"# nothing\naudit\n", 10),
        (b"\n", 1),
        (b"nonsense\n", "EINVAL"),
        (b"audit\n" + b"x" * 5000, 6),
        (b"#" * (LONGEST_WRITE - 1) + b"\nmore", LONGEST_WRITE),
        (b"#" * 5000 + b"\n", LONGEST_WRITE + 1),
        (b"audit\0\n", 6),
    ],
)
def test_text_is_taken_by_the_line_and_ipe_not_asked(data: bytes, taken: object) -> None:
    machine = Machine(rules="DEFAULT action=DENY")
    assert answer(lambda: machine.write(data)) == taken
    assert not machine.records
    assert not machine.told.unjudged


@pytest.mark.parametrize("data", [b"audit", b"#" * LONGEST_WRITE, b""])
def test_text_without_an_end_is_not_judged(data: bytes) -> None:
    """The kernel returns more than was written."""
    machine = Machine()
    assert answer(lambda: machine.write(data)) == "EINVAL"
    assert machine.told.unjudged
