"""What is told of this machine's overlays, on real ones: which file of which layer stands behind a file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve, field, frozen

from ipe_emu.integrity.dm_verity import Parameters
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity import measure
from ipe_emu.integrity.kernel_state import KernelState
from ipe_emu.integrity.sources import OpenFile, Place
from ipe_emu.linux import device_mapper, mountinfo
from ipe_emu.linux.overlayfs import MachineOverlay, Options
from ipe_emu.linux.verity_state import VerityState
from tests.integrity.tools import opened, tool, veritysetup_format


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b"lowerdir=/a:/b,upperdir=/u,workdir=/w", Options(b"/u", (b"/a", b"/b"))),
        (b"ro,lowerdir=a,userxattr", Options(None, (b"a",))),
        (rb"lowerdir=/a\:b:/c\,d:/e\\f", Options(None, (b"/a:b", b"/c,d", rb"/e\f"))),
        (rb"upperdir=/u\,v:w,lowerdir=/a", Options(b"/u,v:w", (b"/a",))),
        (b"lowerdir=/a,lowerdir=/b", Options(None, (b"/b",))),
        (b"upperdir=/u", None),
        (b"lowerdir=", None),
        (b"lowerdir=/a::/data", None),
        (b"lowerdir+=/a", None),
        (b"", None),
    ],
)
def test_the_options_of_mount(data: bytes, options: Options | None) -> None:
    assert Options.parse(data) == options


@frozen
class Stage:
    """A tmpfs below ``place`` for layers, and what is mounted there, undone in the end."""

    place: Path
    _mounted: list[Path] = field(factory=list)

    def mount(self, what: object, name: str, *options: str) -> Path:
        point = self.place / name
        point.mkdir(parents=True, exist_ok=True)
        done = tool("mount", *options, what, point)
        assert done.returncode == 0, done.stderr
        self._mounted.append(point)
        return point

    def directory(self, name: str, *files: str) -> Path:
        for file in files:
            (self.place / name / file).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name / file).write_text(f"{file} of {name}\n")
        (self.place / name).mkdir(parents=True, exist_ok=True)
        return self.place / name

    def overlay(self, name: str, lower: str, *more: str, upper: bool = True) -> Path:
        if not upper:
            lower += f":{self.directory('empty')}"  # there must be two of them
        options = [f"lowerdir={lower}", *more]
        if upper:
            paths = [self.directory(f"{name}-{part}") for part in ("upper", "work")]
            options += [f"upperdir={paths[0]}", f"workdir={paths[1]}"]
        return self.mount("overlay", name, "-t", "overlay", "-o", ",".join(options))

    def move(self, name: str, to: str) -> None:
        new = self.directory(to)
        assert tool("mount", "--move", self.place / name, new).returncode == 0
        self._mounted[self._mounted.index(self.place / name)] = new

    def undo(self) -> None:
        while self._mounted:
            assert tool("umount", self._mounted.pop()).returncode == 0


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "stage")
    try:
        stage.mount("tmpfs", ".", "-t", "tmpfs")
        assert tool("mount", "--make-private", stage.place).returncode == 0
        yield stage
    finally:
        stage.undo()


def overlay_at(point: Path) -> MachineOverlay:
    found = VerityState().overlay(mountinfo.locate(bytes(point)).device)
    assert found is not None
    return found


def behind(file: Path, point: Path) -> Path | None:
    """Where the layer's file behind one on the overlay at ``point`` lies; what is told of it is checked."""
    overlay = overlay_at(point)
    place = mountinfo.locate(bytes(file))
    with overlay.layer_file(place.path, file.stat()) as found:
        if found is None:
            return None
        fd = found.open()
        assert os.read(fd, 100) == file.read_bytes()[:100]
        os.close(fd)
        real = Path(f"/proc/self/fd/{found.fd}").readlink()
        assert found.location == mountinfo.locate(bytes(real))
        assert os.path.samestat(found.status, real.stat())
        return real


root = pytest.mark.needs("root")


@root
def test_the_topmost_layer_that_has_the_file(stage: Stage) -> None:
    one, two = stage.directory("one", "a", "below/b"), stage.directory("two", "a", "below/c", "d")
    point = stage.overlay("o", f"{one}:{two}")
    assert behind(point / "a", point) == one / "a"
    assert behind(point / "below/b", point) == one / "below/b"
    assert behind(point / "below/c", point) == two / "below/c"
    (point / "d").chmod(0o755)  # copied up, with the number of the lower one
    assert behind(point / "d", point) == stage.place / "o-upper/d"
    (point / "new").write_text("new\n")
    assert behind(point / "new", point) == stage.place / "o-upper/new"
    stage.mount(point / "below", "bound", "--bind")
    assert behind(stage.place / "bound/c", point) == two / "below/c"
    other = stage.overlay("other", str(point), upper=False)
    assert behind(other / "a", other) == point / "a"


@root
def test_names_that_options_escape(stage: Stage) -> None:
    lower = stage.directory("a,b c\\d:e,upperdir=x", "a")
    point = stage.overlay("o", str(lower).replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:"), upper=False)
    assert behind(point / "a", point) == lower / "a"
    assert not overlay_at(point).has_upper


@root
def test_paths_that_lead_elsewhere_tell_nothing(stage: Stage) -> None:
    lower = stage.directory("lower", "a", "b")
    point = stage.overlay("o", str(lower))
    lower.rename(stage.place / "renamed")
    assert behind(point / "a", point) is None
    stage.directory("lower", "a")
    times = (point / "a").stat()
    os.utime(lower / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert behind(point / "a", point) is None
    assert behind(point / "b", point) is None


@root
def test_a_file_system_that_is_written_lies_on_no_verity_device(stage: Stage) -> None:
    """And that all layers lie on one, or a file on the upper one, shows in the device number that stat(2) gives."""
    lower = stage.directory("lower", "a")
    stage.mount("tmpfs", "elsewhere", "-t", "tmpfs")
    elsewhere = stage.directory("elsewhere", "b")
    one, read_only = stage.overlay("one", str(lower)), stage.overlay("ro", str(lower), upper=False)
    two = stage.overlay("two", f"{lower}:{elsewhere}")
    xino = stage.overlay("xino", f"{lower}:{elsewhere}", "xino=on")
    for point in (one, two, xino):
        (point / "new").touch()

    def may_lie_on_verity(file: Path) -> bool:
        overlay = evolve(overlay_at(file.parent), some_verity=True)
        assert not evolve(overlay, some_verity=False).may_lie_on_verity(file.stat())
        assert evolve(overlay, separate_data=True).may_lie_on_verity(file.stat())
        return overlay.may_lie_on_verity(file.stat())

    assert [may_lie_on_verity(one / name) for name in ("a", "new")] == [False, False]
    assert may_lie_on_verity(read_only / "a")
    assert may_lie_on_verity(two / "b")
    assert may_lie_on_verity(xino / "b")
    assert not may_lie_on_verity(xino / "new")


@root
def test_where_the_content_may_come_from_another_file(stage: Stage) -> None:
    lower = stage.directory("lower", "a")
    one, other = stage.overlay("one", str(lower), "metacopy=on"), stage.overlay("other", str(lower), "metacopy=off")
    assert overlay_at(one).separate_data
    assert behind(one / "a", one) is None
    assert not overlay_at(other).separate_data


def test_an_overlay_that_nobody_sees() -> None:
    assert VerityState().overlay("0:1048575") is None


@root
def test_the_mounts_are_looked_at_again_when_they_change(stage: Stage) -> None:
    state = VerityState()
    lower = stage.directory("lower", "a")
    first = stage.overlay("one", str(lower))
    device = mountinfo.locate(bytes(first)).device
    found = state.overlay(device)
    assert found is not None
    assert found is state.overlay(device)
    assert tool("umount", first).returncode == 0
    assert state.overlay(device) is None
    stage.overlay("one", str(lower), upper=False)
    stage._mounted.remove(first)
    again = state.overlay(mountinfo.locate(bytes(first)).device)
    assert again is not None
    assert not again.has_upper


# -- with what a kernel vouches for -----------------------------------------------------------------------------------


class Nothing:
    def facts_of(self, place: Place | None, st: os.stat_result, open_file: OpenFile) -> Facts:
        return NO_FACTS


def facts_of(file: Path) -> Facts:
    state = KernelState(Nothing(), VerityState(), None)
    return state.facts_of(mountinfo.locate(bytes(file)), file.stat(), lambda: os.open(file, os.O_RDONLY))


@root
def test_on_a_machine_that_has_no_verity_nothing_holds(stage: Stage) -> None:
    point = stage.overlay("o", str(stage.directory("lower", "a")))
    overlay = overlay_at(point)
    if not overlay.some_verity and not overlay.some_seals:
        assert facts_of(point / "a") is NO_FACTS
    else:
        assert facts_of(point / "a") == NO_FACTS


def ext4(stage: Stage, name: str, *options: str) -> Path:
    image = stage.place.parent / f"{name}.img"
    image.touch()
    os.truncate(image, 8 << 20)
    assert tool("mkfs.ext4", "-q", "-b", "4096", *options, image).returncode == 0
    return image


@pytest.mark.needs("fs-verity", "root")
def test_sealed_files_of_layers(stage: Stage) -> None:
    lower = stage.mount(ext4(stage, "ext4", "-O", "verity"), "lower", "-o", "loop")
    for name in ("sealed", "other"):
        (lower / name).write_text(name)
    assert tool("fsverity", "enable", lower / "sealed").returncode == 0
    with opened(lower / "sealed") as fd:
        sealed = Facts(fsverity_digest=measure(fd, "sha256"))
    point, meta = stage.overlay("o", str(lower)), stage.overlay("meta", str(lower), "metacopy=on")
    assert facts_of(point / "sealed") == sealed
    assert facts_of(point / "other") == NO_FACTS
    assert facts_of(stage.overlay("above", str(point), upper=False) / "sealed") == sealed
    assert facts_of(meta / "sealed").fsverity_in_doubt
    assert facts_of(meta / "other").fsverity_in_doubt
    stage.move("lower", "moved")
    assert facts_of(point / "sealed").fsverity_in_doubt
    assert facts_of(point / "other") == NO_FACTS
    (point / "sealed").chmod(0o755)
    assert facts_of(point / "sealed") == NO_FACTS


@pytest.mark.needs("device-mapper", "root")
def test_layers_on_verity_devices(stage: Stage) -> None:
    image, tree = ext4(stage, "data"), stage.place.parent / "tree"
    written = stage.mount(image, "written", "-o", "loop")
    (written / "a").write_text("a\n")
    assert tool("umount", written).returncode == 0
    stage._mounted.remove(written)
    tree.touch()
    os.truncate(tree, 8 << 20)
    root_hash = veritysetup_format(image, tree, Parameters(2048))
    before = device_mapper.may_have_verity()
    name = f"ipe-emu-test-{os.getpid()}"
    assert tool("veritysetup", "open", image, name, tree, root_hash).returncode == 0
    try:
        assert device_mapper.may_have_verity()
        lower = stage.mount(f"/dev/mapper/{name}", "lower", "-o", "ro")
        point = stage.overlay("o", str(lower))
        (point / "new").write_text("new\n")
        on_verity = Facts(dmverity_roothash=Digest("sha256", bytes.fromhex(root_hash)))
        assert facts_of(point / "a") == on_verity
        assert facts_of(point / "new") == NO_FACTS
        elsewhere = stage.overlay("elsewhere", str(stage.directory("tmpfs", "b")))
        assert facts_of(elsewhere / "b") == NO_FACTS
        stage.move("lower", "moved")
        assert facts_of(point / "a").dmverity_in_doubt
    finally:
        stage.undo()
        assert tool("veritysetup", "close", name).returncode == 0
    assert device_mapper.may_have_verity() is before
