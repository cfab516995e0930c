"""Declared facts: what attaches to what, and what is refused."""

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import frozen

from ipe_emu.errors import UserError
from ipe_emu.integrity.declared import Declared, load
from ipe_emu.integrity.facts import NO_FACTS, Digest, Facts
from ipe_emu.integrity.fsverity import measure
from ipe_emu.linux import mountinfo

ROOTHASH = "ab" * 32


@frozen
class Spot:
    """A place on one file system that is mounted on the root directory, unless a test says otherwise."""

    path: bytes
    device: str = "8:1"
    mount_root: bytes = b"/"
    kind: str = ""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("initramfs/bin/sh", "initramfs/data/file", "opt/app", "opt/tool"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def declare(tree: Path, *tables: str) -> Declared:
    file = tree / "facts.toml"
    file.write_text("\n".join("[[file]]\n" + table.replace("TREE", str(tree)) for table in tables))
    return load(Spot, [file])


def digest_of(path: Path) -> Digest:
    fd = os.open(path, os.O_RDONLY)
    try:
        return measure(fd, "sha256")
    finally:
        os.close(fd)


def facts(declared: Declared, path: Path, place: Spot | None = None) -> Facts:
    return declared.facts_of(place or Spot(os.fsencode(path)), path.stat(), opener(path))


def opener(path: Path) -> Callable[[], int]:
    return lambda: os.open(path, os.O_RDONLY)


def test_a_directory_speaks_for_what_is_below_it(tree: Path) -> None:
    declared = declare(tree, 'path = "TREE/initramfs"\nboot_verified = true')
    assert facts(declared, tree / "initramfs/bin/sh") == Facts(boot_verified=True)
    assert facts(declared, tree / "opt/app") == NO_FACTS
    neighbour = tree / "initramfs2"
    neighbour.write_bytes(b"")
    assert facts(declared, neighbour) == NO_FACTS


def test_the_longest_path_decides_alone(tree: Path) -> None:
    declared = declare(
        tree,
        'path = "TREE/initramfs"\nboot_verified = true',
        f'path = "TREE/initramfs/data"\ndmverity = {{ roothash = "sha256:{ROOTHASH}", signed = true }}',
    )
    expected = Facts(dmverity_roothash=Digest("sha256", bytes.fromhex(ROOTHASH)), dmverity_signature=True)
    assert facts(declared, tree / "initramfs/data/file") == expected


def test_a_symbolic_link_declares_what_it_names(tree: Path) -> None:
    (tree / "link").symlink_to("initramfs")
    declared = declare(tree, 'path = "TREE/link"\nboot_verified = true')
    assert facts(declared, tree / "initramfs/bin/sh").boot_verified


def test_another_file_of_the_same_name_has_no_facts(tree: Path) -> None:
    declared = declare(tree, 'path = "TREE/opt/app"\nboot_verified = true')
    other = tree / "other"
    other.write_bytes(b"evil")
    other.rename(tree / "opt/app")
    assert facts(declared, tree / "opt/app") == NO_FACTS


def test_a_fact_holds_wherever_the_file_system_is_mounted(tree: Path) -> None:
    declared = declare(tree, 'path = "TREE/initramfs"\nboot_verified = true')
    program = tree / "initramfs/bin/sh"
    inside = os.fsencode(tree / "initramfs/bin")
    assert facts(declared, program, Spot(inside + b"/sh", mount_root=inside)).boot_verified
    assert facts(declared, program, Spot(inside + b"/sh", device="8:2")) == NO_FACTS, "another file system"
    assert facts(declared, program, Spot(b"/evil/sh")) == NO_FACTS, "what was mounted over the path"
    assert declared.facts_of(None, program.stat(), opener(program)) == NO_FACTS


def test_in_a_sandbox_a_volume_is_a_mount(tree: Path) -> None:
    declared = declare(tree, f'path = "TREE/opt"\ndmverity = {{ roothash = "sha256:{ROOTHASH}" }}')
    volume = os.fsencode(tree / "opt")
    app = volume + b"/app"
    sandboxed = declared.in_sandbox()
    assert facts(declared, tree / "opt/app", Spot(app)).dmverity_roothash
    assert facts(sandboxed, tree / "opt/app", Spot(app)) == NO_FACTS, "what lies below the mount"
    assert facts(sandboxed, tree / "opt/app", Spot(app, mount_root=volume)).dmverity_roothash
    assert facts(sandboxed, tree / "opt/app", Spot(app, mount_root=app)).dmverity_roothash, "a bind mount of a part"


def test_a_digest_holds_until_the_content_changes(tree: Path) -> None:
    tool = tree / "opt/tool"
    digest = digest_of(tool)
    declared = declare(tree, f'path = "TREE/opt/tool"\nfsverity = {{ digest = "{digest}", signed = true }}')
    assert facts(declared, tool) == Facts(fsverity_digest=digest, fsverity_signature=True)
    tool.chmod(0o755)
    assert facts(declared, tool).fsverity_digest == digest, "other attributes are not content"
    content = tool.read_bytes()
    tool.write_bytes(b"changed")
    assert facts(declared, tool) == NO_FACTS
    tool.write_bytes(content)
    assert facts(declared, tool) == NO_FACTS, "a seal that was broken stays broken"


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ('path = "TREE/missing"\nboot_verified = true', "No such file"),
        ('path = "initramfs"\nboot_verified = true', "absolute"),
        ("boot_verified = true", "absolute"),
        ('path = "TREE/opt"\nboot_verified = 1', "true or false"),
        ('path = "TREE/opt"\nbootverified = true', "unknown key 'bootverified'"),
        ('path = "TREE/opt"\ndmverity = true', "must be a table"),
        ('path = "TREE/opt"\ndmverity = { roothash = "sha256:xyz" }', "ALGORITHM:HEX"),
        ('path = "TREE/opt"\ndmverity = { digest = "sha256:ab" }', "unknown key 'digest'"),
        ('path = "TREE/opt"\nfsverity = { digest = "sha256:ab" }', "single files"),
        ('path = "TREE/opt/app"\ndmverity = { roothash = "sha256:ab" }', "directory a volume is mounted at"),
        (f'path = "TREE/opt/app"\nfsverity = {{ digest = "sha256:{ROOTHASH}" }}', "its fs-verity digest is sha256:"),
        (f'path = "TREE/opt/app"\nfsverity = {{ digest = "sha1:{ROOTHASH}" }}', "no hash algorithm"),
        ('path = "/dev/null"\nboot_verified = true', "neither a regular file"),
        ('path = "TREE/opt"\nboot_verified = true\n[[file]]\npath = "TREE/opt/../opt"', "declared twice"),
        ('path = "TREE/opt"\n[file]', "not TOML"),
    ],
)
def test_what_is_refused(tree: Path, table: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        declare(tree, table)


def test_files_that_are_no_table_of_facts(tree: Path) -> None:
    for content, complaint in ((b"\xff", "UTF-8"), (b"[" * 100_000, "not TOML"), (b"# " + b"x" * (1 << 20), "larger")):
        file = tree / "facts.toml"
        file.write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            load(Spot, [file])
    with pytest.raises(UserError, match="cannot be read"):
        load(Spot, [tree / "none.toml"])


def test_a_change_that_no_time_tells_is_found_all_the_same(tmp_path: Path) -> None:
    """Through a mapping of a page that was read before, on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "tool"
        path.write_bytes(b"a" * 4096)
        with path.open("rb") as file:
            digest = measure(file.fileno(), "sha256").value.hex()
        table = tmp_path / "facts.toml"
        table.write_text(f'[[file]]\npath = "{path}"\nfsverity = {{ digest = "sha256:{digest}", signed = false }}\n')
        facts = load(mountinfo.locate, [table])
        place = mountinfo.locate(os.fsencode(path))

        def known() -> Digest | None:
            return facts.facts_of(place, path.stat(), lambda: os.open(path, os.O_RDONLY)).fsverity_digest

        assert known() is not None
        with path.open("r+b") as changed, mmap.mmap(changed.fileno(), 0) as mapped:
            assert mapped[0] == ord("a")
            before = path.stat()
            mapped[0:1] = b"b"
        assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
        assert known() is None
