"""doctor: what works here is said to work, and what does not has a remedy and exit status 77."""

import json

import pytest

from ipe_emu.cli import doctor
from ipe_emu.linux import probe
from ipe_emu.linux.probe import Probe
from tests.cli.conftest import Run, spawn

GOOD = Probe("good", True, "there", needed_for=("run", "mount"))
LACK = Probe("lacking", False, "not there", "sudo mend it", ("run",))
LESS = Probe("optional", False, "not there either", "sudo mend that")


@pytest.fixture(autouse=True)
def _root_of_yama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_writers_can_be_seen", lambda: GOOD)


@pytest.mark.parametrize(("probes", "status"), [([GOOD], 0), ([GOOD, LESS], 0), ([GOOD, LACK], 77)])
def test_the_exit_status_follows_what_is_needed(
    ipe_emu: Run, monkeypatch: pytest.MonkeyPatch, probes: list[Probe], status: int
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: probes)
    result = ipe_emu("doctor")
    assert result.status == status
    for one in probes:
        assert one.detail in result.out
        assert one.remedy in result.out
    assert ("ipe-emu run does not work here" in result.out) is (status == 77)
    assert "ipe-emu mount works here" in result.out
    assert json.loads(ipe_emu("doctor", "--json").out)["works"] == {
        "run": status == 0, "boot": status == 0, "mount": True,
    }  # fmt: skip


def test_programs_that_read_images_are_wished_for(ipe_emu: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: [GOOD])
    monkeypatch.setattr("shutil.which", lambda *_args, **_kwargs: None)
    result = ipe_emu("doctor")
    assert result.status == 0
    for package, use in (
        ("squashfuse", "run --volume and boot --disk: squashfs"),
        ("lzop", "boot: an image"),
        ("busybox-static", "boot --shell: one that needs no libraries"),
    ):
        assert f"less  {package.partition('-')[0]}" in result.out
        assert f"not installed; for {use}" in result.out
        assert f"sudo apt-get install {package}\n" in result.out


@pytest.mark.needs("fuse", "user-namespaces")
def test_a_machine_that_can_is_told_so() -> None:
    done = spawn("doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["works"] == {"run": True, "boot": True, "mount": True}
