"""What the kernel executes as the init process, and what it hands to it of its command line (init/main.c)."""

from typing import Final

from attrs import frozen

from ipe_emu.errors import UserError
from ipe_emu.kernel_cmdline import words

_RAMDISK_INIT: Final = b"/init"
#: kernel_init(): what it tries where the initramfs has no init and nothing else was asked for.
LAST_RESORTS: Final = (b"/sbin/init", b"/etc/init", b"/bin/init", b"/bin/sh")
_ENVIRONMENT: Final = (b"HOME=/", b"TERM=linux")
#: CONFIG_INIT_ENV_ARG_LIMIT
_MOST: Final = 32

#: Parameters without a dot that kernels take for themselves (Documentation/admin-guide/kernel-parameters.txt), as far
#: as people write them on the command line of a machine that boots an initramfs.
_KNOWN: Final = frozenset(
    b"""    acpi acpi_osi apic audit audit_backlog_limit bootconfig cgroup_disable cgroup_no_v1 clocksource console
    consoleblank cpuidle crashkernel debug default_hugepagesz delayacct disable_mtrr_cleanup earlycon earlyprintk
    elevator enforcing fips hugepages hugepagesz idle ignore_loglevel init initcall_blacklist initcall_debug initrd
    intel_iommu intel_pstate iommu ip ipv6 isolcpus kgdboc lapic log_buf_len loglevel lsm maxcpus mce mem memmap
    memtest mitigations modprobe_blacklist net_ns netconsole nfsroot nmi_watchdog noapic nohz nohz_full nokaslr
    nolapic nomodeset nopti norandmaps noresume noretpoline nosmp nosmt nospectre_v1 nospectre_v2 nox2apic nr_cpus
    numa numa_balancing oops panic panic_on_warn pci pcie_aspm pcie_ports possible_cpus preempt print_fatal_signals
    printk_time psi pti quiet ramdisk_size random rcu_nocbs rdinit reboot reserve resume resume_offset
    retain_initrd ro root rootdelay rootflags rootfstype rootwait rw security selinux skew_tick softlockup_panic
    spectre_v2 stacktrace swapaccount swiotlb sysrq_always_enabled threadirqs time transparent_hugepage tsc ucode
    vga video vmalloc vsyscall x2apic_phys
    """.split()
)


@frozen
class InitArguments:
    """The init process as the kernel starts it.

    ``ramdisk`` is what it executes of the initramfs (rdinit=), ``requested`` what init= asks for where that fails,
    None if nothing. ``arguments`` come behind the program's own path, ``environment`` is in the kernel's order.
    """

    ramdisk: bytes
    requested: bytes | None
    arguments: tuple[bytes, ...]
    environment: tuple[bytes, ...]

    @classmethod
    def of(cls, cmdline: bytes) -> "InitArguments":
        """Read a command line. UserError where it has more words for the init process than a kernel takes."""
        ramdisk, requested = _RAMDISK_INIT, None
        arguments: list[bytes] = []
        environment = list(_ENVIRONMENT)
        waiting = words(cmdline)
        for word in waiting:
            if word == b"--":
                break
            name, equals, value = word.partition(b"=")
            if value[:1] == b'"':
                value = value[1:].removesuffix(b'"')
            if name in (b"init", b"rdinit") and equals:
                if name == b"init":
                    requested = value
                else:
                    ramdisk = value
                # What came before belonged to the default init (init_setup(), rdinit_setup()).
                arguments.clear()
            elif _is_known(name):
                continue
            elif equals:
                _set(environment, name, value)
            else:
                arguments.append(word)
        arguments += waiting  # set_init_arg()
        for what, given in (("arguments", arguments), ("environment variables", environment)):
            if len(given) > _MOST:
                raise UserError(f"--cmdline: more than {_MOST} {what} for the init process: the kernel panics")
        return cls(ramdisk, requested, tuple(arguments), tuple(environment))


def _is_known(name: bytes) -> bool:
    """Whether the kernel keeps a parameter: its own, and those of modules, which have a dot."""
    return b"." in name or name.replace(b"-", b"_") in _KNOWN


def _set(environment: list[bytes], name: bytes, value: bytes) -> None:
    """Put a variable where one of that name is, or at the end (``unknown_bootoption()``)."""
    word = name + b"=" + value
    for i, old in enumerate(environment):
        if old.startswith(name + b"="):
            environment[i] = word
            return
    environment.append(word)
