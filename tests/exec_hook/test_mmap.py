"""mmap, mprotect and their kin under a policy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipe_emu.integrity.facts import Facts
from tests.exec_hook.tracee_harness import Rehearsal

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

BOOT_ONLY = "DEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
ALLOW_ALL = "DEFAULT action=ALLOW\n"

# Ten pages: of a trusted file, of an untrusted one, anonymous, executable, and a hole.
LAYOUT = """
    base = mmap_(10 * 4096, 0, 0x22, -1)
    def place(page, path, prot):
        fd = os.open(path, os.O_RDONLY) if path else -1
        address = call("mmap", base + page * 4096, 4096, prot, 0x12 if path else 0x32, fd, 0)
        if path:
            os.close(fd)
        return address
"""


@pytest.fixture
def inside(tree: Path, tmp_path: Path) -> Iterator[Rehearsal]:
    with Rehearsal(tmp_path / "root", tree) as rehearsal:
        rehearsal.facts.devices[rehearsal.device_of("/t")] = Facts(boot_verified=True)
        yield rehearsal


def test_each_mapping_is_asked_about_in_order(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = (
        LAYOUT
        + """
    place(0, "/t/lib/libf.so", 1)
    place(1, "/run/t/lib/libf.so", 1)
    place(2, None, 1)
    place(3, "/t/bin/sh", 5)
    place(4, "/t/bin/hello", 0)
    result = outcome(lambda: mprotect(base, 5 * 4096, 5))
    """
    )
    assert inside.run(source) == {"ok": 0}
    assert inside.asked() == [
        "MMAP /t/bin/sh", "MPROTECT /t/lib/libf.so", "MPROTECT /run/t/lib/libf.so", "MPROTECT ?",
        "MPROTECT /t/bin/hello",
    ]  # fmt: skip


def test_the_first_denial_ends_it(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = (
        LAYOUT
        + """
    place(0, "/t/lib/libf.so", 1)
    place(1, "/run/t/lib/libf.so", 1)
    place(2, "/t/lib/libf.so", 1)
    denied = outcome(lambda: mprotect(base, 3 * 4096, 5))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "libf.so" in line]
    result = denied, [line.split()[1] for line in lines]
    """
    )
    assert inside.run(source) == [{"error": "EACCES"}, ["r--p"] * 3]
    assert inside.asked() == ["MPROTECT /t/lib/libf.so", "MPROTECT /run/t/lib/libf.so"]


def test_a_part_of_a_mapping_is_asked_about_once(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = (
        LAYOUT
        + """
    result = outcome(lambda: mprotect(base + 4096, 1, 4)), outcome(lambda: mprotect(base, 10 * 4096, 5))
    """
    )
    assert inside.run(source) == [{"ok": 0}, {"ok": 0}]
    # The middle page is executable by then; the rest around it is two mappings.
    assert inside.asked() == ["MPROTECT ?"] * 3


def test_a_hole_is_reached_only_after_what_lies_before(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = (
        LAYOUT
        + """
    call("munmap", base + 2 * 4096, 4096)
    place(0, "/t/lib/libf.so", 1)
    place(1, "/t/bin/sh", 1)
    place(3, "/run/t/bin/sh", 1)
    result = outcome(lambda: mprotect(base, 4 * 4096, 5)), outcome(lambda: mprotect(base + 2 * 4096, 2 * 4096, 5))
    """
    )
    assert inside.run(source) == [{"error": "ENOMEM"}] * 2
    assert inside.asked() == ["MPROTECT /t/lib/libf.so", "MPROTECT /t/bin/sh"]


def test_what_a_mapping_can_never_be_is_no_question(inside: Rehearsal) -> None:
    """Only what lies before it is asked about, and changed."""
    inside.policy(ALLOW_ALL)
    source = (
        LAYOUT
        + """
    os.mkdir("/run/noexec")
    call("mount", b"x", b"/run/noexec", b"tmpfs", 8, None)
    Path("/run/noexec/file").write_bytes(bytes(4096))
    place(0, "/t/lib/libf.so", 1)
    place(1, "/run/noexec/file", 1)
    place(2, "/t/lib/libf.so", 1)
    fd = os.open("/t/lib/libf.so", os.O_RDONLY)
    call("mmap", base + 3 * 4096, 4096, 1, 0x11, fd, 0)
    result = [
        outcome(lambda: mprotect(base, 3 * 4096, 5)),
        outcome(lambda: mprotect(base + 3 * 4096, 4096, 7)),
        outcome(lambda: mprotect(base, 4096, 0x25)),
        outcome(lambda: mprotect(base, 4096, 0x01000005)),
        outcome(lambda: mprotect(base, 4096, 0x02000005)),
        [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[5:6] in
         (["/t/lib/libf.so"], ["/run/noexec/file"])],
    ]
    """
    )
    denied, invalid = {"error": "EACCES"}, {"error": "EINVAL"}
    assert inside.run(source) == [denied, denied, invalid, invalid, invalid, ["r-xp", "r--p", "r--p", "r--s"]]
    assert inside.asked() == ["MPROTECT /t/lib/libf.so"]


def test_files_without_a_directory_entry(inside: Rehearsal) -> None:
    """Their names are the kernel's own, and nothing is known of them."""
    inside.policy(ALLOW_ALL)
    source = """
        def go(how):
            address = how()
            mprotect(address, 4096, 5)
        def deleted():
            os.link("/run/t/bin/sh", "/run/doomed")
            fd = os.open("/run/doomed", os.O_RDONLY)
            os.unlink("/run/doomed")
            return fd
        result = [
            outcome(lambda: go(how)) for how in (
                lambda: mmap_(4096, 1, 1, memfd_of("/t/bin/sh", "a b")),
                lambda: mmap_(4096, 3, 0x21, -1),
            )
        ]
        mmap_(4096, 5, 2, deleted())
    """
    assert inside.run(source) == [{"ok": 0}, {"ok": 0}]
    # A path with a blank is audited in hex.
    assert inside.asked() == [
        "MPROTECT " + b"/memfd:a b (deleted)".hex().upper(), "MPROTECT " + b"/dev/zero (deleted)".hex().upper(),
        "MMAP " + b"/run/doomed (deleted)".hex().upper(),
    ]  # fmt: skip
    assert all('dev="tmpfs"' in text for text in inside.texts())


def test_named_shared_memory_is_still_a_file(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = """
        address = mmap_(4096, 3, 0x21, -1)
        outcome(lambda: call("prctl", 0x53564D41, 0, address, 4096, b"name"))  # not every kernel has names
        result = outcome(lambda: mprotect(address, 4096, 5))
    """
    assert inside.run(source) == {"ok": 0}
    assert inside.asked() == ["MPROTECT " + b"/dev/zero (deleted)".hex().upper()]


def test_what_is_no_regular_file_is_named_too(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    inside.run("""
        result = [outcome(lambda: mmap_(4096, 5, 2, fd)) for fd in (
            os.pipe()[0], socket.socket().detach(), os.eventfd(0), os.open("/dev/zero", os.O_RDONLY))]
    """)
    names = [(text.split('path="')[1].split('"')[0].split(":")[0], text.split('dev="')[1].split('"')[0])
             for text in inside.texts()]  # fmt: skip
    assert names[:3] == [("pipe", "pipefs"), ("socket", "sockfs"), ("anon_inode", "anon_inodefs")]
    assert names[3][0] == "/dev/zero"


def test_an_offset_within_a_page_is_no_question(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = """
        fd = os.open("/run/t/bin/sh", os.O_RDONLY)
        result = [outcome(lambda: call("mmap", 0, 4096, 5, flags, number, 1)) for flags, number in
                  ((2, fd), (2, 99), (0x22, -1), (0x40022, -1))]
    """
    assert inside.run(source) == [{"error": "EINVAL"}] * 4
    assert inside.records == []
    assert inside.notes.unjudged == []


def test_libraries_of_a_dynamic_program(inside: Rehearsal) -> None:
    """The library is denied by mmap, which the loader reports; the program ends by itself."""
    inside.policy(BOOT_ONLY)
    source = """
        os.mkdir("/run/lib")
        shutil.copy("/lib/x86_64-linux-gnu/libc.so.6", "/run/lib/libc.so.6")
        result = run(lambda: os.execve("/t/bin/hello", ["hello"], {"LD_LIBRARY_PATH": "/run/lib"}))
    """
    assert inside.run(source) == {"exit": 127}
    assert inside.asked()[-1] == "MMAP /run/lib/libc.so.6"


def test_executable_shared_memory_segments_are_refused(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    source = """
        def go():
            call("unshare", 0x08000000)  # an IPC namespace: nothing is left in the machine's
            segment = call("shmget", 0, 4096, 0o1700)
            call("shmat", segment, 0, 0)
            call("shmat", segment, 0, 0o100000)
        result = run(go)
    """
    assert inside.run(source) == {"error": "EPERM"}
    assert [call for call, _ in inside.notes.unjudged] == ["shmat"]


@pytest.mark.parametrize("persona", [0x0400000, 0x0100000, 0x0500008])
def test_personalities_that_hide_executable_memory_are_refused(inside: Rehearsal, persona: int) -> None:
    inside.policy(ALLOW_ALL)
    source = "result = outcome(lambda: call('personality', persona)), call('personality', 0xFFFFFFFF)"
    assert inside.run(source, persona=persona) == [{"error": "EPERM"}, 0]
    assert [call for call, _ in inside.notes.unjudged] == ["personality"]


def test_huge_anonymous_pages_are_refused(inside: Rehearsal) -> None:
    inside.policy(ALLOW_ALL)
    assert inside.run("result = outcome(lambda: mmap_(2 << 20, 7, 0x40022, -1))") == {"error": "EPERM"}
    assert [call for call, _ in inside.notes.unjudged] == ["mmap"]


def test_remapped_pages_of_an_executable_file(inside: Rehearsal) -> None:
    inside.policy(BOOT_ONLY)
    source = """
        fd = os.open("/t/bin/sh", os.O_RDWR)
        address = mmap_(8192, 5, 1, fd)
        result = outcome(lambda: call("remap_file_pages", address, 4096, 0, 1, 0))
    """
    assert inside.run(source) == {"ok": 0}
    assert inside.asked() == ["MMAP /t/bin/sh"] * 2


def test_calls_of_other_threads_wait_for_nobody(inside: Rehearsal) -> None:
    """Many threads and processes at once: every call is answered, each with its own file."""
    inside.policy(BOOT_ONLY)
    source = """
        def work(path, want):
            for _ in range(20):
                assert outcome(lambda: map_memory(path, "rx")) == want, path
        def go():
            pairs = [("/t/lib/libf.so", {"ok": 0}), ("/run/t/lib/libf.so", {"error": "EACCES"})] * 4
            threads = [threading.Thread(target=work, args=pair) for pair in pairs]
            failed = []
            threading.excepthook = failed.append
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failed, failed
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                status = run(go)
                os._exit(0 if status == {"exit": 0} else 1)
            children.append(pid)
        result = [os.waitpid(pid, 0)[1] for pid in children]
    """
    assert inside.run(source) == [0, 0, 0]
    assert len(inside.records) == 3 * 8 * 20
