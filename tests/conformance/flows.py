"""Boots as people make them, and the mistakes they make: each is a loader, with one fault at most.

Real kernels boot them (scripts/conformance_boot.py), and the report of each must begin with what the fault is called
(tests/rehearse/report/test_flows.py).
"""

from attrs import evolve

from tests.conformance.boots import INITRAMFS, OFF, OPEN, SIGNED, VOLUME, Boot, policy
from tests.rehearse.images import MOUNTS

_CRYPTSETUP = ("/usr/sbin/veritysetup",)
#: A loader that stops at whatever fails, as careful ones do.
_STRICT = "set -e\n"
_OPEN = f"export PATH=/bin:/usr/sbin\n{OPEN}\n"
_MOUNT = "mount -t squashfs -o ro /dev/mapper/root /newroot\n"
_SWITCH = "umount /sys/kernel/security /sys /proc /dev; exec switch_root /newroot /init\n"
#: What the root's init does.
_ROOT = f"/bin/busybox true; echo OUT in the new root $?\n{OFF}"

_ROOT_POLICY = policy("Root", "1.0.0", INITRAMFS + VOLUME)

# -- a signed policy, by a loader that checks everything ---------------------------------------------------------------

#: It finds the digest of the policy on the command line, mounts securityfs itself, and reads back what it wrote.
_CAREFUL = f"""{MOUNTS}{_STRICT}{_OPEN}{_MOUNT}
read -r words </proc/cmdline
for word in $words; do case $word in policy.sha256=*) wanted=${{word#*=}};; esac; done
found=$(sha256sum </etc/root.p7b); [ "${{found%% *}}" = "$wanted" ]; echo OUT the digest is right
umount /sys/kernel/security; mount -t securityfs none /sys/kernel/security
cat /etc/root.p7b >$IPE/new_policy; echo OUT loaded
echo 1 >$IPE/enforce; read -r enforce <$IPE/enforce || [ "$enforce" = 1 ]; echo OUT enforcing
echo 1 >$IPE/policies/Root/active; read -r active <$IPE/policies/Root/active || [ "$active" = 1 ]; echo OUT active
{_SWITCH}"""
SIGNED_FLOW = Boot(
    "flow: a signed policy",
    _CAREFUL,
    signed={"root": ("trusted", _ROOT_POLICY)},
    programs=_CRYPTSETUP,
    cmdline=("policy.sha256=SHA256(root)",),
    volume=_ROOT,
    headline="as expected: powered off",
)

# -- systemd's order: what is there already is updated, and each is activated ------------------------------------------

_SYSTEMD = f"""{MOUNTS}{_STRICT}
for file in /etc/ipe-*.p7b; do
    name=${{file#/etc/ipe-}}; name=${{name%.p7b}}
    if [ -e $IPE/policies/$name ]; then cat $file >$IPE/policies/$name/update; else cat $file >$IPE/new_policy; fi
    echo 1 >$IPE/policies/$name/active; echo OUT $name is active
done
{_OPEN}{_MOUNT}{_SWITCH}"""
_UPDATE = policy("AllowInitramfs", "0.0.1", INITRAMFS + VOLUME)
_SYSTEMD_FLOW = Boot(
    "flow: systemd's order",
    _SYSTEMD,
    signed={"ipe-AllowInitramfs": ("trusted", _UPDATE), "ipe-Root": ("trusted", _ROOT_POLICY)},
    programs=_CRYPTSETUP,
    volume=_ROOT,
    headline="as expected: powered off",
)

# -- a root that is an overlay, whose root hash is signed --------------------------------------------------------------

_OVERLAY_FLOW = Boot(
    "flow: an overlay on a root with a signed root hash",
    f"""{MOUNTS}{_STRICT}cat /etc/root.p7b >$IPE/new_policy; echo 1 >$IPE/policies/Root/active
{_OPEN.rstrip()} --root-hash-signature=/etc/root.sig
mkdir /lower; mount -t squashfs -o ro /dev/mapper/root /lower
mount -t tmpfs none /tmp; mkdir /tmp/upper /tmp/work
mount -t overlay -o lowerdir=/lower,upperdir=/tmp/upper,workdir=/tmp/work root /newroot
{_SWITCH}""",
    signed={"root": ("trusted", policy("Root", "1.0.0", INITRAMFS + SIGNED))},
    programs=_CRYPTSETUP,
    volume=f"echo written >/etc/written; {_ROOT}",
    root_hash_key="trusted",
    headline="as expected: powered off",
)

# -- an unsigned policy, with a root hash that is computed in the initramfs --------------------------------------------

#: No released kernel takes it; op-policy does where the initramfs may load policies.
UNSIGNED_FLOW = Boot(
    "flow: an unsigned policy",
    f"""{MOUNTS}{_STRICT}{_OPEN}{_MOUNT}
mount -t tmpfs none /tmp
veritysetup format --salt=$(printf salt | hexdump -v -e '/1 "%02x"') ${{disk}}a /tmp/tree >/tmp/said
hash=$(sed -n 's/^Root hash:[[:space:]]*//p' /tmp/said); [ $hash = ROOT_HASH ]; echo OUT computed
cat >/tmp/policy << END
policy_name=Root policy_version=1.0.0
DEFAULT action=DENY
{INITRAMFS}op=EXECUTE dmverity_roothash=sha256:$hash action=ALLOW
END
cat /tmp/policy >$IPE/new_policy; echo OUT loaded
echo 1 >$IPE/policies/Root/active; echo OUT active
{_SWITCH}""",
    programs=_CRYPTSETUP,
    volume=_ROOT,
    headline="the policy failed it: unsigned policy: this kernel",
)

_ANOTHER = "0" * 64

FLOWS = (
    SIGNED_FLOW,
    _SYSTEMD_FLOW,
    _OVERLAY_FLOW,
    UNSIGNED_FLOW,
    evolve(
        SIGNED_FLOW,
        name="fault: another policy than the command line's",
        cmdline=(f"policy.sha256={_ANOTHER}",),
        headline="the machine failed for its own reasons: init ended, with status 1",
    ),
    evolve(
        SIGNED_FLOW,
        name="fault: a key that is not trusted",
        signed={"root": ("untrusted", _ROOT_POLICY)},
        headline="the policy failed it: signing key not trusted",
    ),
    evolve(
        SIGNED_FLOW,
        name="fault: the root hash of another image",
        signed={"root": ("trusted", _ROOT_POLICY.replace("ROOT_HASH", _ANOTHER))},
        headline="the policy failed it: root hash of another image: the policy does not name this volume's",
    ),
    evolve(
        SIGNED_FLOW,
        name="fault: a tampered image",
        tampered=True,
        headline="the machine failed for its own reasons: tampered volume: ",
    ),
    evolve(
        SIGNED_FLOW,
        name="fault: a tool that the root lacks",
        volume=f"exec /usr/bin/tool\n{OFF}",
        headline="the machine failed for its own reasons: init ended, with status 127: a program was not found",
    ),
    evolve(
        SIGNED_FLOW,
        name="fault: a script in /run",
        volume=f"""mount -t tmpfs none /tmp; printf '#!/bin/sh\\necho OUT never\\n' >/tmp/script
chmod 755 /tmp/script; /tmp/script; echo OUT $?
{OFF}""",
        headline="the policy failed it: unverified file executed: tmpfs",
    ),
    evolve(
        SIGNED_FLOW,
        name="fault: tee with a large policy",
        script=_CAREFUL.replace("cat /etc/root.p7b >$IPE/new_policy", "tee $IPE/new_policy </etc/root.p7b >/dev/null"),
        signed={"root": ("trusted", _ROOT_POLICY + "# filling\n" * 900)},
        headline="the policy failed it: policy written in pieces: 1024 of",
    ),
    evolve(
        _SYSTEMD_FLOW,
        name="fault: activated before the root is mounted",
        signed={"ipe-Root": ("trusted", policy("Root", "1.0.0", VOLUME))},
        headline="the policy failed it: policy activated too early",
    ),
    evolve(
        _SYSTEMD_FLOW,
        name="fault: an older version",
        signed={"ipe-AllowInitramfs": ("trusted", policy("AllowInitramfs", "0.0.0"))},
        headline="the policy failed it: older policy version: an update must be newer",
    ),
    evolve(
        _SYSTEMD_FLOW,
        name="fault: another name",
        signed={"ipe-AllowInitramfs": ("trusted", _ROOT_POLICY)},
        headline="the policy failed it: another policy's name",
    ),
    evolve(
        _OVERLAY_FLOW,
        name="fault: a changed program on the overlay",
        volume=f"cp /bin/busybox /bin/changed; /bin/changed true; echo OUT $?\n{OFF}",
        headline="the policy failed it: unverified file executed: overlay",
    ),
    evolve(
        _OVERLAY_FLOW,
        name="fault: a root hash that a stranger signed",
        root_hash_key="untrusted",
        headline="the machine failed for its own reasons: root hash signed by a key that is not trusted: ",
    ),
)  # fmt: skip
