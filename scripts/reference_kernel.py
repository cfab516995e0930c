"""Build the kernels that the emulator is compared with: User-Mode Linux with IPE, from Debian's source packages.

usage: python -m scripts.reference_kernel [--refresh] [SERIES ...]     SERIES: 6.12, 7.3 (default: both)

Each is one program, kept in ${XDG_CACHE_HOME:-~/.cache}/ipe-emu under its configuration's digest. One that is there
is used without asking the network; --refresh looks for a newer package. Debian's archive is reached by the addresses
that this machine's apt has, or by DEBIAN_MIRROR, and apt's own configuration is left as it is.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "tests" / "vectors"
BOOT_POLICY = VECTORS / "boot-policy.pol"
TRUSTED_KEYS = VECTORS / "keys" / "builtin-trusted.pem"
FRAGMENT = Path(__file__).parent / "reference-kernel.config"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SERIES = ("6.12", "7.3")

#: Where Debian keeps kernels, most settled first; a suite that a mirror lacks is passed over.
_MAIN_SUITES = ("bookworm-backports", "trixie", "trixie-backports", "forky", "sid")
_SECURITY_SUITES = ("bookworm-security", "trixie-security")
#: Debian packages that a build needs (install_missing).
_NEEDED = {
    "flex": "flex", "bison": "bison", "bc": "bc", "make": "make", "gcc": "gcc", "xz": "xz-utils", "openssl": "openssl",
    "/usr/include/openssl/ssl.h": "libssl-dev", "/usr/include/libelf.h": "libelf-dev",
    str(KEYRING): "debian-archive-keyring",
}  # fmt: skip
#: What the recorded kernels of a series had besides; the next one has no such option (profiles.unavailable_hashes).
_MORE = {"6.12": "CONFIG_CRYPTO_SM3_GENERIC=y\n"}
#: file, what is there, what it becomes. A CPU with AMX has 11,264 bytes of registers, and with room for fewer init dies
#: of "ptrace set fp regs failed". (Linux 7.3 asks the CPU.)
_PATCHES = (("arch/x86/um/user-offsets.c", "DEFINE_LONGS(HOST_FP_SIZE, 2696)", "DEFINE_LONGS(HOST_FP_SIZE, 11264)"),)


class NotReachableError(Exception):
    """A kernel cannot be had here; the message says why, and what would help."""


@frozen
class Kernel:
    """A reference kernel that is ready to boot."""

    series: str
    program: Path

    @property
    def profile(self) -> str:
        """The emulator's name for it."""
        return f"linux-{self.series}"

    @property
    def package_version(self) -> str:
        """Debian's version of the source it was built from."""
        return (self.program.parent / "version").read_text().strip()

    @property
    def configuration(self) -> Path:
        """Its complete .config."""
        return self.program.parent / "config"


def say(text: str) -> None:
    """Tell the user what goes on."""
    print(f"reference-kernel: {text}", file=sys.stderr, flush=True)


def cache() -> Path:
    """Where kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipe-emu" / "reference-kernels"


@functools.cache
def configuration_digest(series: str) -> str:
    """What a kernel depends on besides its source: configuration, boot policy, keys and patches."""
    digest = hashlib.sha256(repr(_PATCHES).encode() + _MORE.get(series, "").encode())
    for path in (FRAGMENT, BOOT_POLICY, TRUSTED_KEYS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def built(series: str) -> Kernel | None:
    """The newest kernel of a series that is in the cache with this configuration."""
    found = [*cache().glob(f"linux-{series}_*_{configuration_digest(series)}/linux")]
    return Kernel(series, max(found, key=lambda program: program.stat().st_mtime)) if found else None


# -- Debian's archive -----------------------------------------------------------------------------------------------


def _archives() -> tuple[str, str]:
    """The addresses of Debian's archive and of its security archive, as this machine's apt has them."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    found = {
        label: uri for origin, label, uri in (line.split("|") for line in listed.splitlines()) if origin == "Debian"
    }
    main = os.environ.get("DEBIAN_MIRROR") or found.get("Debian")
    if main is None:
        raise NotReachableError(
            "apt knows no archive of Debian here. Run apt-get update on a Debian machine, or name one:"
            " DEBIAN_MIRROR=ADDRESS"
        )
    return main.rstrip("/"), found.get("Debian-Security", main.rstrip("/") + "-security").rstrip("/")


def _compare_versions(one: str, other: str) -> int:
    """Debian's order, as functools.cmp_to_key takes it."""
    return 1 if subprocess.run(["dpkg", "--compare-versions", one, "gt", other], check=False).returncode == 0 else -1


class Apt:
    """apt with a configuration of its own: Debian's suites that have kernels, in a directory that goes again."""

    def __init__(self, directory: Path) -> None:
        main, security = _archives()
        for name in ("lists/partial", "archives/partial", "preferences.d"):
            (directory / name).mkdir(parents=True)
        sources = directory / "sources.list"
        pairs = [(security, suite) for suite in _SECURITY_SUITES] + [(main, suite) for suite in _MAIN_SUITES]
        sources.write_text("".join(f"deb [signed-by={KEYRING}] {uri} {suite} main\n" for uri, suite in pairs))
        configured = {
            "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": directory / "lists",
            "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": directory / "preferences.d",
            "Dir::State::status": "/dev/null", "Dir::Cache": directory, "Dir::Cache::archives": directory / "archives",
            "APT::Sandbox::User": "", "Acquire::Languages": "none",
        }  # fmt: skip
        self._options = [f"-o{name}={value}" for name, value in configured.items()]
        self._directory = directory
        # A suite that the mirror lacks is an error of the whole update; whether the rest is enough shows below.
        updated = self._run("apt-get", "update", check=False)
        self._complaints = "\n".join(line for line in updated.stderr.splitlines() if line.startswith(("E:", "W:")))

    def _run(self, program: str, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        command = [program, *self._options, "-q", *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise NotReachableError(f"{program} {arguments[0]} failed:\n{done.stderr}")
        return done

    def newest(self, package: str) -> str:
        """The newest version that is no release candidate."""
        listed = self._run("apt-cache", "madison", package).stdout
        versions = [fields[1].strip() for line in listed.splitlines() if len(fields := line.split("|")) == 3]
        versions = [version for version in dict.fromkeys(versions) if "~rc" not in version]
        if not versions:
            raise NotReachableError(
                f"Debian's archive, as it is reached from here, has no {package}. Looked in "
                + ", ".join(_SECURITY_SUITES + _MAIN_SUITES)
                + (f"; apt said:\n{self._complaints}" if self._complaints else "")
            )
        return max(versions, key=functools.cmp_to_key(_compare_versions))

    def newest_of(self, pattern: str) -> tuple[str, str]:
        """The package with the newest version, of those whose names match a pattern."""
        listed = self._run("apt-cache", "search", "--names-only", pattern).stdout
        found = {name: self.newest(name) for line in listed.splitlines() if (name := line.split(" ")[0])}
        if not found:
            raise NotReachableError(
                f"Debian's archive, as it is reached from here, has no package {pattern}"
                + (f"; apt said:\n{self._complaints}" if self._complaints else "")
            )
        by_version = functools.cmp_to_key(_compare_versions)
        return max(found.items(), key=lambda package: by_version(package[1]))

    def download(self, package: str, version: str) -> Path:
        """Fetch a package; apt checks it against the archive's signature."""
        self._run("apt-get", "download", f"{package}={version}")
        return next(self._directory.glob(f"{package}_*.deb"))


# -- building -------------------------------------------------------------------------------------------------------


def install_missing(needed: Mapping[str, str], purpose: str) -> None:
    """Install the packages that are missing where that needs no password; else name them.

    ``needed``: Debian packages, by a program or file that shows that one is there. ``purpose``: what needs them.
    """
    missing = [
        package for sign, package in needed.items()
        if not (Path(sign).exists() if sign.startswith("/") else shutil.which(sign))
    ]  # fmt: skip
    if not missing:
        return
    install = ["apt-get", "install", "--no-install-recommends", "-y", *missing]
    can_sudo = (
        shutil.which("sudo")
        and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    )
    if os.geteuid() and not can_sudo:
        raise NotReachableError(f"{purpose} needs packages. Type:   sudo {' '.join(install)}")
    say(f"installing: {' '.join(missing)}")
    prefix = ["sudo", "-n"] if os.geteuid() else []
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run([*prefix, *install], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise NotReachableError(f"apt could not install them. Type:   {' '.join(install)}\n{done.stderr}")


def _unpack(package: Path, series: str, directory: Path) -> Path:
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
    package.unlink()
    archive = directory / "usr" / "src" / f"linux-source-{series}.tar.xz"
    subprocess.run(["tar", "-xJf", archive, "-C", directory], check=True)
    archive.unlink()
    return directory / f"linux-source-{series}"


def _configure(source: Path, series: str) -> None:
    for name, before, after in _PATCHES:
        file = source / name
        file.write_text(file.read_text().replace(before, after))
    wanted = (
        FRAGMENT.read_text()
        + _MORE.get(series, "")
        + f'CONFIG_IPE_BOOT_POLICY="{BOOT_POLICY}"\nCONFIG_SYSTEM_TRUSTED_KEYS="{TRUSTED_KEYS}"\n'
    )
    (source / "kernel" / "configs" / "ipe-emu.config").write_text(wanted)
    _make(source, "tinyconfig", "ipe-emu.config")
    got = set((source / ".config").read_text().splitlines())
    lost = [
        line
        for line in wanted.splitlines()
        if line.startswith("CONFIG_") and not line.endswith("=n") and line not in got
    ]
    if lost:
        raise NotReachableError(f"this version's Kconfig does not grant: {', '.join(lost)}")


def _make(source: Path, *targets: str) -> None:
    log = source / "build.log"
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    with log.open("ab") as output:
        done = subprocess.run(
            ["nice", "make", jobs, "ARCH=um", *targets],
            cwd=source,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise NotReachableError(f"make {targets[0]} failed:\n{tail}")


@contextlib.contextmanager
def _work_directory() -> Iterator[Path]:
    # Beside the cache and not in /tmp, which may be a small tmpfs: a tree takes about 2 GB.
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building.", dir=cache()) as name:
        yield Path(name)


def build(series: str, apt: Apt, directory: Path) -> Kernel:
    """Build the newest kernel of a series, unless it is there. NotReachableError where it cannot be had."""
    package = f"linux-source-{series}"
    version = apt.newest(package)
    home = cache() / f"linux-{series}_{version.replace(':', '%')}_{configuration_digest(series)}"
    kernel = Kernel(series, home / "linux")
    if kernel.program.exists():
        return kernel
    say(f"fetching {package} {version}")
    source = _unpack(apt.download(package, version), series, directory)
    _configure(source, series)
    say(f"building Linux {version} for user mode (some minutes)")
    _make(source, "linux")
    subprocess.run(["strip", source / "linux"], check=True)
    ready = directory / "ready"
    ready.mkdir()
    shutil.copy2(source / "linux", ready / "linux")
    shutil.copy2(source / ".config", ready / "config")
    (ready / "version").write_text(version + "\n")
    ready.rename(home)
    shutil.rmtree(source)
    return kernel


def main(arguments: list[str]) -> int:
    """Build what is missing. 0: all that was asked for is there; 1: one could not be had."""
    parser = argparse.ArgumentParser(description="Build User-Mode Linux kernels with IPE from Debian's sources.")
    parser.add_argument("series", nargs="*", metavar="SERIES", help=f"which: {', '.join(SERIES)} (default: all)")
    parser.add_argument("--refresh", action="store_true", help="look for newer packages")
    options = parser.parse_args(arguments)
    wanted = options.series or list(SERIES)
    if unknown := set(wanted) - set(SERIES):
        parser.error(f"no such series: {', '.join(sorted(unknown))}")
    missing = [series for series in wanted if options.refresh or built(series) is None]
    failed = False
    if missing:
        with _work_directory() as directory:
            try:
                install_missing(_NEEDED, "building a kernel")
                apt = Apt(directory / "apt")
            except NotReachableError as error:
                say(str(error))
                return 1
            for series in missing:
                try:
                    build(series, apt, directory)
                except NotReachableError as error:
                    failed = True
                    say(f"Linux {series} cannot be had here: {error}")
    for series in wanted:
        if kernel := built(series):
            print(f"linux-{series}: Debian's {kernel.package_version}, {kernel.program}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
