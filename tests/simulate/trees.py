"""A tree with a program of every sort: static, dynamic, scripts, a module, and those that cannot run."""

import shutil
import subprocess
from pathlib import Path

from attrs import frozen

_MAIN = "int foo(void) __attribute__((weak)); int main(void) { return foo ? foo() : 0; }\n"
_MODULE = (
    'struct { char list[24], name[56]; } this_module __attribute__((section(".gnu.linkonce.this_module")))'
    ' = { "", "x" };\n'
)
# Maps the file it is given, as a dynamic linker does with a library.
_MAP = """
#include <fcntl.h>
#include <sys/mman.h>
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDONLY);
    return mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED;
}
"""
# Loads the module it is given from its file, and nothing else if that fails, as busybox would.
_LOAD = """
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) { return syscall(SYS_finit_module, open(argv[1], O_RDONLY), "", 0) != 0; }
"""
LINKER = "/lib64/ld-linux-x86-64.so.2"


@frozen
class Compiler:
    """Compiles into a tree; whatever is linked against is found in the tree alone."""

    root: Path

    def _run(self, source: str, target: str, *options: str) -> Path:
        output = self.root / target.lstrip("/")
        output.parent.mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = ["gcc", "-x", "c", "-", "-x", "none", "-o", output, *options]
        subprocess.run(command, input=source, text=True, check=True, timeout=60, capture_output=True)
        return output

    def library(self, target: str, source: str = "int foo(void) { return 0; }\n", *options: str) -> Path:
        """A shared library, with its file name for a SONAME unless ``options`` say something else."""
        name = target.rpartition("/")[2]
        library = self._run(source, target, "-shared", "-fPIC", f"-Wl,-soname,{name}", *options)
        library.chmod(0o644)
        return library

    def program(self, target: str, *options: str, needs: str | None = None, source: str = _MAIN) -> Path:
        """A program that ends with 0. ``needs`` is a library of the tree."""
        linked = [str(self.root / needs.lstrip("/"))] if needs else []
        return self._run(source, target, "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", *linked, *options)

    def module(self, target: str) -> Path:
        return self._run(_MODULE, target, "-c")


def _script(root: Path, target: str, text: bytes, mode: int = 0o755) -> None:
    path = root / target.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    path.chmod(mode)


def build(root: Path) -> None:
    """Fill ``root``."""
    root.mkdir(exist_ok=True)
    made = Compiler(root)
    for directory in ("bin", "lib64", "lib/x86_64-linux-gnu", "etc", "opt/conf", "opt/own/lib", "tmp", "proc"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    shutil.copy(LINKER, root / "lib64/ld-2.so")
    (root / "lib64/ld-linux-x86-64.so.2").symlink_to("/lib64/ld-2.so")  # absolute: in the tree it stays in the tree
    shutil.copy("/lib/x86_64-linux-gnu/libc.so.6", root / "lib/x86_64-linux-gnu/libc.so.6")
    _libraries_and_programs(made, root)
    _scripts(root)
    _odd_files(made, root)


def _libraries_and_programs(made: Compiler, root: Path) -> None:
    made.program("bin/map", "-static", source=_MAP)
    made.program("bin/load", "-static", source=_LOAD)
    made.program("bin/static", "-static")
    made.program("bin/static-pie", "-static-pie")
    made.program("bin/dynamic")
    made.program("bin/no-pie", "-no-pie")
    (root / "bin/hard-link").hardlink_to(root / "bin/dynamic")
    made.library("lib/x86_64-linux-gnu/libdefault.so")
    made.program("bin/default", needs="lib/x86_64-linux-gnu/libdefault.so")
    made.library("opt/own/lib/libown.so")
    made.program("opt/own/bin/runpath", "-Wl,--enable-new-dtags,-rpath,$ORIGIN/../lib", needs="opt/own/lib/libown.so")
    made.program("bin/not-found", needs="opt/own/lib/libown.so")
    # A library that needs another: DT_RPATH of the program leads to it, DT_RUNPATH does not.
    leaf = made.library("opt/own/lib/libleaf.so", "int leaf(void) { return 0; }\n")
    made.library("opt/own/lib/libmiddle.so", "int leaf(void); int foo(void) { return leaf(); }\n", str(leaf))
    middle = "opt/own/lib/libmiddle.so"
    made.program("bin/rpath", "-Wl,--disable-new-dtags,-rpath,/opt/own/lib", needs=middle)
    made.program("bin/runpath", "-Wl,--enable-new-dtags,-rpath,/opt/own/lib", needs=middle)
    made.library("opt/cached/libcached.so")
    made.program("bin/cached", needs="opt/cached/libcached.so")
    cpu = made.library("lib/x86_64-linux-gnu/libcpu.so")
    made.program("bin/for-any-cpu", needs="lib/x86_64-linux-gnu/libcpu.so")
    better = cpu.parent / "glibc-hwcaps/x86-64-v2"
    better.mkdir(parents=True)
    shutil.copy(cpu, better)
    (root / "etc/ld.so.conf").write_text("/opt/cached\n")
    subprocess.run(["/sbin/ldconfig", "-r", root], check=True, timeout=60, capture_output=True)
    (root / "etc/ld.so.conf").write_text("/opt/cached\n/opt/conf\n")  # ldconfig has not seen this
    made.library("opt/conf/libconf.so")
    made.program("bin/configured", needs="opt/conf/libconf.so")
    stack = made.library("lib/x86_64-linux-gnu/libstack.so", "int foo(void) { return 0; }\n", "-Wl,-z,execstack")
    made.program("bin/stack", needs=str(stack.relative_to(root)))
    data = "lib/x86_64-linux-gnu/libdata.so"
    made.library(data, "int bar = 1;\n", "-nostdlib", "-Wl,-z,separate-code")
    made.program("bin/data", needs=data)
    made.library("lib/x86_64-linux-gnu/libbad.so")
    made.program("bin/bad-library", needs="lib/x86_64-linux-gnu/libbad.so")
    (root / "lib/x86_64-linux-gnu/libbad.so").write_bytes(b"not an ELF file" * 100)
    made.library("lib/x86_64-linux-gnu/libshort.so")
    made.program("bin/short-library", needs="lib/x86_64-linux-gnu/libshort.so")
    (root / "lib/x86_64-linux-gnu/libshort.so").write_bytes(b"\x7fELF")
    # One that is of another machine is passed over.
    made.library("opt/other/libtwo.so")
    made.library("lib/x86_64-linux-gnu/libtwo.so")
    made.program("bin/other-machine", "-Wl,-rpath,/opt/other", needs="lib/x86_64-linux-gnu/libtwo.so")
    with (root / "opt/other/libtwo.so").open("r+b") as file:
        file.seek(18)
        file.write(b"\xb7\0")
    made.library("opt/path/libpath.so", "int foo(void) { return 0; }\n", "-Wl,-soname,/opt/path/libpath.so")
    made.program("bin/by-path", needs="opt/path/libpath.so")
    made.program("bin/no-linker", "-Wl,--dynamic-linker=/lib/none.so")
    made.program("bin/text-linker", "-Wl,--dynamic-linker=/bin/text")
    made.module("lib/modules/x.ko")


def _scripts(root: Path) -> None:
    (root / "bin/sh").symlink_to("/bin/busybox")
    _script(root, "bin/script", b"#!/bin/sh\nexit 0\n")
    _script(root, "bin/script-of-dynamic", b"#! /bin/dynamic -x\n")
    _script(root, "bin/chained", b"#!/bin/script\n")
    _script(root, "bin/no-interpreter", b"#!/usr/bin/none\n")
    _script(root, "bin/crlf", b"#!/bin/sh\r\nexit 0\r\n")
    _script(root, "bin/empty-line", b"#!\n")
    _script(root, "bin/nul", b"#!")
    _script(root, "bin/text", b"exit 0\n")
    _script(root, "bin/not-executable", b"#!/bin/sh\nexit 0\n", 0o644)
    _script(root, "bin/of-not-executable", b"#!/bin/not-executable\n")
    _script(root, "bin/of-a-directory", b"#!/bin\n")
    _script(root, "bin/loop", b"#!/bin/loop\n")
    (root / "bin/circle").symlink_to("circle")
    _script(root, "bin/of-a-circle", b"#!/bin/circle\n")
    _script(root, "bin/d1", b"#!/bin/sh\n")
    for depth in range(2, 8):
        _script(root, f"bin/d{depth}", f"#!/bin/d{depth - 1}\n".encode())


def _misaligned(program: bytes) -> bytes:
    """Move the first segment that is loaded by eight bytes: too late for an error, the kernel cannot map it."""
    changed = bytearray(program)
    for at in range(64, 64 + 56 * program[56], 56):
        if changed[at] == 1:  # PT_LOAD
            changed[at + 16] += 8
            return bytes(changed)
    raise AssertionError


def _odd_files(made: Compiler, root: Path) -> None:
    dynamic = (root / "bin/dynamic").read_bytes()
    _script(root, "bin/cut", dynamic[:80])
    _script(root, "bin/misaligned", _misaligned((root / "bin/static").read_bytes()))
    _script(root, "bin/empty", b"")
    _script(root, "bin/new\nline", b"#!/bin/sh\nexit 0\n")
    _script(root, "bin/latin-\xe9".encode("latin-1").decode("utf-8", "surrogateescape"), b"#!/bin/sh\nexit 0\n")
    made.program("bin/plain-data", source="int main(void) { return 0; }\n")
    (root / "bin/plain-data").chmod(0o644)
