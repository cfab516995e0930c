"""The node tree, without FUSE."""

import errno
import stat
from pathlib import Path

import pytest

from ipe_emu.audit import AuditRecord
from ipe_emu.errors import KernelError
from ipe_emu.event import Subject
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.lsm import Ipe, Opener, PolicyAdded, PolicyRemoved, Writer
from ipe_emu.profiles import PROFILES
from ipe_securityfs.tree import ROOT_INO, Directory, File, Owner, Tree, lsm_list
from tests.securityfs.policies import policy
from tests.vectors import BOOT_POLICY, KEYS

ADMIN = Writer(Opener(cap_mac_admin=True), Subject(1, b"init"))


def make_ipe(profile: str = "linux-7.3") -> Ipe:
    records: list[AuditRecord] = []
    keys = load_certificates([KEYS / "builtin-trusted.pem"])
    ipe = Ipe(Keyrings(builtin=keys), emit=records.append, profile=PROFILES[profile])
    ipe.load_boot_policy(BOOT_POLICY.read_bytes())
    return ipe


@pytest.fixture
def ipe() -> Ipe:
    return make_ipe()


@pytest.fixture
def tree(ipe: Ipe) -> Tree:
    return Tree(ipe, lsm_list=b"capability,ipe")


def at(tree: Tree, path: str) -> Directory | File:
    node: object = tree.root
    for name in filter(None, path.split("/")):
        assert isinstance(node, Directory)
        node = node.lookup(name.encode())
    assert isinstance(node, Directory | File), path
    return node


def directory_at(tree: Tree, path: str) -> Directory:
    node = at(tree, path)
    assert isinstance(node, Directory)
    return node


def file_at(tree: Tree, path: str) -> File:
    node = at(tree, path)
    assert isinstance(node, File)
    return node


def load(tree: Tree, name: str) -> Directory:
    write = file_at(tree, "ipe/new_policy").write
    assert write is not None
    write(policy(name), ADMIN)
    return directory_at(tree, f"ipe/policies/{name}")


def test_layout_and_modes(tree: Tree) -> None:
    found = {node.path: (f"{node.attributes.mode:o}", node.nlink) for node in tree}
    policy_nodes = {
        "pkcs7": "100444",
        "policy": "100444",
        "name": "100444",
        "version": "100444",
        "active": "100600",
        "update": "100200",
        "delete": "100200",
    }
    assert found == {
        "": ("40755", 3),
        "lsm": ("100444", 1),
        "ipe": ("40755", 3),
        "ipe/success_audit": ("100600", 1),
        "ipe/enforce": ("100600", 1),
        "ipe/policies": ("40755", 3),
        "ipe/policies/AllowInitramfs": ("40755", 2),
        "ipe/new_policy": ("100200", 1),
        **{f"ipe/policies/AllowInitramfs/{name}": (mode, 1) for name, mode in policy_nodes.items()},
    }
    assert tree.root.ino == ROOT_INO


def test_what_cannot_be_read_or_written_has_no_function_for_it(tree: Tree) -> None:
    one_way = {node.name: (bool(node.read), bool(node.write)) for node in tree if isinstance(node, File)}
    assert {name for name, (reads, _) in one_way.items() if not reads} == {b"new_policy", b"update", b"delete"}
    assert {name for name, (_, writes) in one_way.items() if not writes} == {
        b"lsm", b"pkcs7", b"policy", b"name", b"version",
    }  # fmt: skip


def test_the_newest_is_first(tree: Tree) -> None:
    load(tree, "A")
    load(tree, "B")
    assert [name for name, _ in tree.policies.listing()] == [b"B", b"A", b"AllowInitramfs"]
    assert tree.policies.nlink == 5


def test_a_removed_policy_keeps_its_numbers_until_it_is_forgotten(tree: Tree) -> None:
    directory = load(tree, "A")
    name = file_at(tree, "ipe/policies/A/name")
    name.lookups = 2
    delete = file_at(tree, "ipe/policies/A/delete")
    assert delete.write is not None
    delete.write(b"1", ADMIN)
    assert tree.policies.lookup(b"A") is None
    assert directory.removed
    assert directory.nlink == 0
    with pytest.raises(KeyError):  # the kernel was never told of it
        tree.node(directory.ino)
    assert tree.node(name.ino) is name
    tree.forget(name.ino, 1)
    assert tree.node(name.ino) is name
    assert name.read is not None
    with pytest.raises(KernelError) as error:
        name.read()
    assert error.value.errno == errno.ENOENT
    tree.forget(name.ino, 1)
    with pytest.raises(KeyError):
        tree.node(name.ino)
    tree.forget(name.ino, 1)  # harmless
    used = {node.ino for node in tree}
    again = load(tree, "A")
    assert again.ino > max(used | {directory.ino, name.ino, delete.ino})


def test_a_living_node_is_never_forgotten(tree: Tree) -> None:
    node = file_at(tree, "ipe/enforce")
    tree.forget(node.ino, 5)
    assert tree.node(node.ino) is node


def test_news_that_come_late_do_not_take_the_next_policy_away(ipe: Ipe, tree: Tree) -> None:
    """A policy is deleted and one of its name loaded, and the second news overtakes the first."""
    old = load(tree, "A")
    held: list[PolicyAdded | PolicyRemoved] = []
    ipe._listeners[:] = [held.append]
    delete = file_at(tree, "ipe/policies/A/delete").write
    assert delete is not None
    delete(b"1", ADMIN)
    ipe.new_policy(policy("A"), ADMIN)
    removed, added = held
    tree._on_news(added)
    new = directory_at(tree, "ipe/policies/A")
    tree._on_news(removed)
    assert directory_at(tree, "ipe/policies/A") is new is not old


@pytest.mark.parametrize(("profile", "known"), [("linux-6.12", False), ("linux-7.3", False), ("op-policy", True)])
def test_activate_is_a_name_of_op_policy_only(profile: str, known: bool) -> None:
    tree = Tree(make_ipe(profile), lsm_list=b"ipe")
    directory = directory_at(tree, "ipe/policies/AllowInitramfs")
    assert (directory.lookup(b"activate") is not None) == known
    assert b"activate" not in [name for name, _ in directory.listing()]
    if known:
        alias, active = file_at(tree, "ipe/policies/AllowInitramfs/activate"), directory.lookup(b"active")
        assert isinstance(active, File)
        assert alias.alias
        assert alias.attributes is active.attributes
        assert alias.read is not None
        assert alias.read() == b"1"


def test_nodes_belong_to_whom_the_mount_belongs(ipe: Ipe) -> None:
    tree = Tree(ipe, lsm_list=b"ipe", owner=Owner(1000, 100))
    assert {(node.attributes.uid, node.attributes.gid) for node in tree} == {(1000, 100)}
    assert all(stat.S_IMODE(node.attributes.mode) for node in tree)


@pytest.mark.parametrize(
    ("content", "shown", "known"),
    [
        (b"lockdown,capability,ipe,bpf", b"lockdown,capability,ipe,bpf", True),
        (b"lockdown,capability\n", b"lockdown,capability,ipe", True),
        (b"", b"capability,ipe", False),
        (None, b"capability,ipe", False),
    ],
)
def test_the_lsm_list_is_the_machine_s(content: bytes | None, shown: bytes, known: bool, tmp_path: Path) -> None:
    source = tmp_path / "lsm"
    if content is not None:
        source.write_bytes(content)
    assert lsm_list(source) == (shown, known)
