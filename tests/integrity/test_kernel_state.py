"""What this machine's kernel would vouch for, by answers recorded on kernels that do.

No machine that tests run on need have fs-verity or device-mapper: answers stand here as Linux 6.12 and 7.3 gave them.
Where it has, the last tests ask it.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define, evolve, field

from ipe_emu.errors import KernelError, NotJudgedError
from ipe_emu.integrity.dm_verity import Parameters
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity import measure
from ipe_emu.integrity.kernel_state import KernelState
from ipe_emu.integrity.sources import FactsSource, OpenFile, Place
from ipe_emu.linux import mountinfo
from ipe_emu.linux.mountinfo import Location
from ipe_emu.linux.verity_state import VerityState
from tests.integrity.tools import opened, tool, veritysetup_format

DIGEST = Digest("sha256", bytes(range(32)))
HASH = "d82898e743b7a2d1c25e2212d28d12874151b178f6a1927e4c51874f52fe6960"
TABLE = f"1 7:1 7:0 4096 4096 2048 1 sha256 {HASH} 0102"
SIGNED_TABLE = TABLE + " 2 root_hash_sig_key_desc cryptsetup:x"
ROOT_HASH = Digest("sha256", bytes.fromhex(HASH))
PLACE = Location("254:0", b"/bin/x", b"/", "ext4")


@define
class Layer:
    """The file of a layer, sealed or not."""

    location: Location
    status: os.stat_result

    def open(self) -> int:
        return os.open(b"/proc/self/fd/0", os.O_RDONLY)  # whatever it is: the kernel's answer counts


@define
class Overlay:
    """An overlay, and what is found in its layers."""

    layer: Location | None = None
    on_verity: bool = False
    some_seals: bool = True
    separate_data: bool = False

    def may_lie_on_verity(self, st: os.stat_result) -> bool:
        return self.on_verity

    @contextlib.contextmanager
    def layer_file(self, path: bytes, st: os.stat_result) -> Iterator[Layer | None]:
        yield None if self.layer is None else Layer(self.layer, st)


@define
class Kernel:
    measured: Digest | int = errno.ENODATA
    signature: bytes = b""
    table: str | type[Exception] | None = None
    sealed: bool = False
    of_device: Overlay | None = None
    asked: list[str] = field(factory=list)

    def measure_verity(self, fd: int) -> tuple[int, bytes]:
        self.asked.append("measure")
        if isinstance(self.measured, int):
            raise OSError(self.measured, os.strerror(self.measured))
        return 1, self.measured.value

    def read_signature(self, fd: int, limit: int) -> bytes:
        return self.signature[:limit]

    def is_sealed(self, fd: int) -> bool:
        return self.sealed

    def overlay(self, device: str) -> Overlay | None:
        return self.of_device

    def verity_table(self, device: str) -> str | None:
        self.asked.append(device)
        if isinstance(self.table, type):
            raise self.table
        return self.table


@define
class Known:
    facts: Facts = NO_FACTS

    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        return self.facts


def verify(digest: Digest, signature: bytes) -> None:
    if (digest, signature) != (DIGEST, b"good"):
        raise KernelError(errno.EKEYREJECTED, "a bad signature", "fsverity_verify_signature")


def ask(kernel: Kernel, path: Path, *, known: FactsSource | None = None, place: Place | None = PLACE) -> Facts:
    state = KernelState(known or Known(), kernel, verify)
    return state.facts_of(place, path.stat(), lambda: os.open(path, os.O_RDONLY))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"content")
    return tmp_path / "file"


def test_a_file_of_which_the_kernel_knows_nothing(file: Path) -> None:
    assert ask(Kernel(), file) is NO_FACTS
    assert ask(Kernel(), file.parent) is NO_FACTS


def test_a_sealed_file(file: Path) -> None:
    assert ask(Kernel(DIGEST), file) == Facts(fsverity_digest=DIGEST)


def test_a_sealed_file_with_a_signature(file: Path) -> None:
    assert ask(Kernel(DIGEST, b"good"), file) == Facts(fsverity_digest=DIGEST, fsverity_signature=True)


def test_a_file_whose_signature_other_keys_verified_could_not_be_opened(file: Path) -> None:
    with pytest.raises(KernelError, match="EKEYREJECTED"):
        ask(Kernel(DIGEST, b"bad"), file)


def test_a_signature_where_the_keys_are_not(file: Path) -> None:
    state = KernelState(Known(), Kernel(DIGEST, b"good"), None)
    with pytest.raises(NotJudgedError, match="the keys for it are not here"):
        state.facts_of(PLACE, file.stat(), lambda: os.open(file, os.O_RDONLY))


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EOPNOTSUPP])
def test_a_file_system_without_fs_verity_is_asked_once(file: Path, number: int) -> None:
    kernel = Kernel(number)
    state = KernelState(Known(), kernel, verify)
    for _ in range(3):
        assert state.facts_of(PLACE, file.stat(), lambda: os.open(file, os.O_RDONLY)) is NO_FACTS
    assert kernel.asked.count("measure") == 1


@pytest.mark.parametrize("kind", ["fuse", "fuse.squashfuse", "fuseblk", "tmpfs", ""])
def test_who_serves_a_file_system_cannot_say_that_files_are_sealed(file: Path, kind: str) -> None:
    kernel = Kernel(DIGEST)
    assert ask(kernel, file, place=evolve(PLACE, kind=kind)) is NO_FACTS
    assert "measure" not in kernel.asked


def test_a_file_that_cannot_be_read(file: Path) -> None:
    def fails() -> int:
        raise PermissionError

    assert KernelState(Known(), Kernel(DIGEST), verify).facts_of(PLACE, file.stat(), fails) is NO_FACTS


def test_a_verity_device(file: Path) -> None:
    assert ask(Kernel(table=TABLE), file) == Facts(dmverity_roothash=ROOT_HASH)
    assert ask(Kernel(table=TABLE), file, place=None) is NO_FACTS


def test_both(file: Path) -> None:
    both = Facts(fsverity_digest=DIGEST, dmverity_roothash=ROOT_HASH)
    assert ask(Kernel(DIGEST, table=TABLE), file) == both


def test_a_verity_device_with_a_signature_that_others_verified(file: Path) -> None:
    with pytest.raises(NotJudgedError, match="declare it"):
        ask(Kernel(table=SIGNED_TABLE), file)


@pytest.mark.parametrize(
    ("table", "reason"), [(PermissionError, "run as root, or declare it"), ("1 2 3", "is not understood")]
)
def test_a_verity_device_whose_root_hash_is_not_known(file: Path, table: "str | type[Exception]", reason: str) -> None:
    facts = ask(Kernel(table=table), file)
    assert reason in (facts.dmverity_in_doubt or "")
    assert evolve(facts, dmverity_in_doubt=None) == NO_FACTS


@pytest.mark.parametrize("table", [PermissionError, SIGNED_TABLE, "1 2 3"])
def test_what_is_certain_only_where_it_is_declared(file: Path, table: "str | type[Exception]") -> None:
    declared = Facts(dmverity_roothash=ROOT_HASH, dmverity_signature=True)
    kernel = Kernel(table=table)
    assert ask(kernel, file, known=Known(declared)) == declared
    assert kernel.asked == ["measure"]


def test_a_declared_digest_goes_first(file: Path) -> None:
    declared = Facts(fsverity_digest=Digest("sha512", bytes(64)))
    kernel = Kernel(DIGEST)
    assert ask(kernel, file, known=Known(declared)) == declared
    assert kernel.asked == ["254:0"]


# -- overlays that were there before ----------------------------------------------------------------------------------

ON_OVERLAY = Location("0:57", b"/bin/x", b"/", "overlay")


def ask_overlay(overlay: Overlay | None, kernel: Kernel, file: Path, known: Facts = NO_FACTS) -> Facts:
    kernel.of_device = overlay
    return ask(kernel, file, place=ON_OVERLAY, known=Known(known))


def in_doubt(facts: Facts) -> tuple[bool, bool]:
    assert not facts.dmverity_roothash
    assert not facts.fsverity_digest
    return facts.dmverity_in_doubt is not None, facts.fsverity_in_doubt is not None


def test_where_no_layer_can_have_facts_none_is_looked_for(file: Path) -> None:
    assert ask_overlay(Overlay(PLACE), Kernel(DIGEST, table=TABLE), file) is NO_FACTS
    assert ask_overlay(Overlay(separate_data=True, some_seals=False), Kernel(DIGEST), file) is NO_FACTS


def test_the_file_of_the_layer_counts(file: Path) -> None:
    sealed, on_verity = Facts(fsverity_digest=DIGEST), Facts(dmverity_roothash=ROOT_HASH)
    assert ask_overlay(Overlay(PLACE), Kernel(DIGEST, sealed=True), file) == sealed
    assert ask_overlay(Overlay(PLACE, on_verity=True), Kernel(table=TABLE), file) == on_verity
    booted = Facts(boot_verified=True)
    assert ask_overlay(Overlay(PLACE, on_verity=True), Kernel(), file, booted) == booted
    assert ask_overlay(Overlay(PLACE, on_verity=True), Kernel(table=PermissionError), file).dmverity_in_doubt


def test_what_the_layers_do_not_tell_is_in_doubt(file: Path) -> None:
    assert in_doubt(ask_overlay(None, Kernel(), file)) == (True, True)
    assert in_doubt(ask_overlay(Overlay(on_verity=True), Kernel(), file)) == (True, False)
    assert in_doubt(ask_overlay(Overlay(), Kernel(sealed=True), file)) == (False, True)
    assert in_doubt(ask_overlay(Overlay(separate_data=True), Kernel(), file)) == (False, True)
    declared = Facts(dmverity_roothash=ROOT_HASH)
    of_file = ask_overlay(Overlay(on_verity=True), Kernel(sealed=True), file, declared)
    assert evolve(of_file, fsverity_in_doubt=None) == declared
    assert of_file.fsverity_in_doubt


def test_this_machine_itself(file: Path) -> None:
    state = KernelState(Known(), VerityState(), verify)
    assert state.facts_of(None, file.stat(), lambda: os.open(file, os.O_RDONLY)) is NO_FACTS


# -- where the kernel has them ----------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system with fs-verity."""
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    image.touch()
    os.truncate(image, 64 << 20)
    for command in (("mkfs.ext4", "-q", "-b", "4096", "-O", "verity", image), ("mount", "-o", "loop", image, place)):
        assert tool(*command).returncode == 0
    yield place
    assert tool("umount", place).returncode == 0


@pytest.mark.needs("fs-verity", "root")
def test_a_file_that_this_machine_has_sealed(mounted: Path) -> None:
    file = mounted / "file"
    file.write_bytes(b"content")
    state = KernelState(Known(), VerityState(), verify)

    def ask_it() -> Facts:
        return state.facts_of(mountinfo.locate(bytes(file)), file.stat(), lambda: os.open(file, os.O_RDONLY))

    assert ask_it() is NO_FACTS
    assert tool("fsverity", "enable", file).returncode == 0
    with opened(file) as fd:
        assert ask_it() == Facts(fsverity_digest=measure(fd, "sha256"))


@pytest.mark.needs("device-mapper", "root")
def test_a_file_on_a_verity_device_of_this_machine(tmp_path: Path) -> None:
    data, tree, place = tmp_path / "data", tmp_path / "tree", tmp_path / "place"
    place.mkdir()
    for image in (data, tree):
        image.touch()
        os.truncate(image, 8 << 20)
    assert tool("mkfs.ext4", "-q", "-b", "4096", data).returncode == 0
    root_hash = veritysetup_format(data, tree, Parameters(2048))
    name = f"ipe-emu-test-{os.getpid()}"
    assert tool("veritysetup", "open", data, name, tree, root_hash).returncode == 0
    try:
        assert tool("mount", "-o", "ro", f"/dev/mapper/{name}", place).returncode == 0
        try:
            file = place / "lost+found"
            state = KernelState(Known(), VerityState(), verify)
            facts = state.facts_of(mountinfo.locate(bytes(file)), file.stat(), lambda: -1)
        finally:
            assert tool("umount", place).returncode == 0
    finally:
        assert tool("veritysetup", "close", name).returncode == 0
    assert facts == Facts(dmverity_roothash=Digest("sha256", bytes.fromhex(root_hash)))
