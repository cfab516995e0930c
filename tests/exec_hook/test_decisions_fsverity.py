"""Recorded decisions of two kernels about a file system with fs-verity, through files that are really sealed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ipe_emu.exec_hook.sealing import Sealing
from ipe_emu.integrity.facts import Digest, Facts
from ipe_emu.integrity.fsverity import measure
from ipe_emu.integrity.fsverity_signature import formatted_digest, verify_signature
from ipe_emu.integrity.seals import Seals
from ipe_emu.integrity.sources import Combined, Place
from ipe_emu.keyring import Keyrings, load_certificates
from ipe_emu.linux import mountinfo
from ipe_emu.linux.inotify import InodeWatch
from ipe_emu.linux.mountinfo import Location
from ipe_emu.pkcs7.sign import sign_detached
from tests import vectors
from tests.exec_hook.test_decisions import STEPS, normalised
from tests.exec_hook.tracee_harness import FactsOfDevices, Rehearsal
from tests.integrity.tools import opened

pytestmark = [pytest.mark.timeout(120), pytest.mark.needs("busybox", "user-namespaces")]

#: What the recorder's policy names: its own bin/hello and lib/libf.so.
RECORDED = {
    "bin/hello": "23e0c9ad12f1543a36c32bd20f8974ed02078d8279360f4a233a43a4ab924a3b",
    "lib/libf.so": "c3a9907baf1af69fcf7512add26c8517dac5b01cb88a30c6f459a97cc8e20b10",
}
#: The sealed files, and whether with a signature.
SEALED = {"bin/hello": False, "lib/libf.so": True, "bin/hello_static": True}

MOUNT = """
Path("/mnt/fsv").mkdir(parents=True)
call("mount", b"fsv", b"/mnt/fsv", b"tmpfs", 0, b"mode=755")
shutil.copytree("/t", "/mnt/fsv", symlinks=True, dirs_exist_ok=True)
"""
ENABLE = """
fd = os.open(path, os.O_RDONLY)
held = ctypes.create_string_buffer(bytes.fromhex(signature))
argument = struct.pack("=IIIIQIIQ88x", 1, 1, 4096, 0, 0, len(signature) // 2, 0, ctypes.addressof(held))
result = outcome(lambda: call("ioctl", fd, 0x40806685, argument))
os.close(fd)
"""
WRITE = "result = outcome(lambda: os.close(os.open(path, os.O_WRONLY)))"


def steps(kernel: str) -> list[dict[str, Any]]:
    """The steps on /mnt/fsv alone, each with its policy's rules."""
    found = []
    rules = ""
    for line in vectors.load(kernel, "integrity-decisions"):
        rules = line.get("rules", rules)
        if "op" in line and set(re.findall(r"/mnt/\w+", json.dumps([line["args"], line["audit"]]))) == {"/mnt/fsv"}:
            found.append(line | {"rules": rules})
    return found


def digest_of(path: Path) -> Digest:
    with opened(path) as fd:
        return measure(fd, "sha256")


def signature_of(path: Path) -> bytes:
    key, certificate = ((vectors.KEYS / f"trusted.{suffix}").read_bytes() for suffix in ("key", "pem"))
    return sign_detached(formatted_digest(digest_of(path)), key, certificate, digest="sha256")


@pytest.mark.parametrize("kernel", vectors.KERNELS)
def test_recorded_decisions(kernel: str, tree: Path, tmp_path: Path) -> None:
    keyrings = Keyrings(fsverity=load_certificates([vectors.KEYS / "trusted.pem"]))
    places: list[Place] = [Location("none yet", b"/", b"/")]
    watch = InodeWatch()
    seals = Seals(watch)
    sealing = Sealing(seals, places, lambda digest, signature: verify_signature(digest, signature, keyrings))
    digests = {text: digest_of(tree / "t" / name).value.hex() for name, text in RECORDED.items()}

    def ours(text: str) -> str:
        for recorded, digest in digests.items():
            text = text.replace(recorded, digest).replace(recorded.upper(), digest.upper())
        return text

    def theirs(text: str) -> str:
        return re.sub(r'(path="/mnt/fsv/[^"]*" dev=)"\w*"', r'\1"vdd"', normalised(text))

    count = 0
    with Rehearsal(tmp_path / "root", tree, traps=sealing.traps, before=[MOUNT]) as rehearsal:
        boot = FactsOfDevices({rehearsal.device_of("/t"): Facts(boot_verified=True)})
        rehearsal.facts = Combined([boot, seals])
        rehearsal.policy("")
        mounted = next(m for m in mountinfo.of(rehearsal.pid).values() if m.point == b"/mnt/fsv")
        places[:] = [Location(mounted.device, b"/", b"/")]
        for name, signed in SEALED.items():
            signature = signature_of(tree / "t" / name).hex() if signed else ""
            path = f"/mnt/fsv/{name}"
            assert rehearsal.run(ENABLE, path=path, signature=signature) == {"ok": 0}
            assert rehearsal.run(WRITE, path=path) == {"error": "EPERM"}
        for step in steps(kernel):
            rehearsal.policy(ours(step["rules"]), kernel=kernel, enforce=step["enforce"])
            result = rehearsal.run(STEPS[step["op"]], args=step["args"])
            got = [(record.type, theirs(record.text.decode())) for record in rehearsal.records]
            want = [(record["type"], ours(normalised(record["text"]))) for record in step["audit"]]
            assert (result, got) == (step["result"], want), (step["policy"], step["op"], step["args"])
            assert not rehearsal.notes.unjudged
            count += 1
    watch.close()
    assert count == 88
