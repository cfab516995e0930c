"""Reports of real boots: the mistakes that people make, named in the first line."""

import json
from pathlib import Path

import pytest

from tests.exec_hook.running import Runner, runner
from tests.rehearse.images import MOUNTS, NEW_ROOT, boot, build_tree

pytestmark = [pytest.mark.needs("fuse", "user-namespaces", "busybox"), pytest.mark.timeout(100)]

NEXT = """policy_name=Next policy_version=1.0.0
DEFAULT action=DENY
op=EXECUTE boot_verified=TRUE action=ALLOW
"""
NEW_INIT = "#!/bin/sh\n/bin/busybox poweroff -f\n"
SWITCH = f"{NEW_ROOT}\numount /sys/kernel/security /sys /proc /dev\nexec switch_root /newroot /init"
OFF = "/bin/busybox poweroff -f"

#: What init does with /etc/new.pol; the emulated kernel; what the first line says. More are in test_flows.py.
MISTAKES = {
    "line-by-line": (
        "while read -r line; do echo $line; done </etc/new.pol >$IPE/new_policy", NEXT, "op-policy",
        "policy written in pieces: 3 writes",
    ),
    "syntax": ("cat /etc/new.pol >$IPE/new_policy", NEXT + "op=EXEC\n", "op-policy", "policy that does not parse"),
    "tee": (
        "tee $IPE/new_policy </etc/new.pol >/dev/null", NEXT + "# filling\n" * 900, "op-policy",
        "policy written in pieces",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_first_line_of_a_real_boot_names_the_mistake(one: Runner, mistake: str) -> None:
    command, policy, kernel, name = MISTAKES[mistake]
    tree = build_tree(one.place / "tree", f"{MOUNTS}{command}\n{OFF}\n", {"etc/new.pol": policy})
    done = boot(one, tree, "--kernel", kernel)
    assert done.status == 1, done.errors
    first = next(line for line in done.errors.splitlines() if "result: " in line)
    assert f"the policy failed it: {name}" in first
    if mistake == "tee":
        assert "the policy Next 1.0.0 that was loaded is only the first piece of one" in done.errors


def test_a_loader_that_fails_unnoticed_and_the_reports_in_files(emu: Runner) -> None:
    page, data = emu.place / "report.html", emu.place / "report.json"
    init = f"{MOUNTS}cat /etc/new.pol >$IPE/new_policy || true\n{SWITCH}\n"
    policy = "policy_name=Boot policy_version=0.0.0\nDEFAULT action=ALLOW\n"
    tree = build_tree(emu.place / "tree", init, {"etc/new.pol": NEXT, "etc/newinit": NEW_INIT})
    done = boot(emu, tree, "--html", str(page), "--json", str(data), policy=policy)
    assert done.status == 1, done.errors
    report = json.loads(data.read_text())
    assert report["status"] == 1
    assert report["headline"].startswith("the policy failed it: unsigned policy")
    assert any("the boot went on to its real root as if it had not" in warning for warning in report["warnings"])
    kinds = [event["event"] for event in report["events"]]
    assert kinds[:2] == ["Started", "ImageUnpacked"]
    assert "SwitchedRoot" in kinds
    assert kinds[-1] == "Rebooted"
    paths = [event["file"]["path"] for event in report["events"] if event["event"] == "Judged" and event["file"]]
    assert paths[:2] == ["/init", "/bin/busybox"]
    text = page.read_text()
    assert "<svg" in text
    assert "unsigned policy" in text
    assert (page.stat().st_mode & 0o777, data.stat().st_mode & 0o777) == (0o600, 0o600)


def test_an_image_that_cannot_be_judged_still_has_a_report(one: Runner) -> None:
    image, data = one.place / "image", one.place / "report.json"
    image.write_bytes(b"\x1f\x8b\x08\x08name that never ends")
    done = boot(one, image, "--json", str(data))
    assert done.status == 4, done.errors
    report = json.loads(data.read_text())
    assert report["result"] == "not-judged"
    assert "Initramfs unpacking failed: header error" in report["headline"]


def test_a_report_that_cannot_be_written_is_an_error_before_the_boot(tmp_path: Path) -> None:
    one = runner(tmp_path, plain_user=False)
    tree = build_tree(one.place / "tree", OFF)
    done = boot(one, tree, "--html", str(one.place / "nowhere" / "report.html"))
    assert done.status == 2
    assert "--html" in done.errors
    assert "No such file or directory" in done.errors
