"""What is said of every file of a tree, against what happens to it on a real kernel.

The tree is the initramfs, so that the reference kernels' boot policy lets it run. What is not trusted of it is covered
by a copy on a tmpfs.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ipe_emu.simulate.judge import Judgement, Kind
from tests.simulate.cases import DENY, DISTRUSTED, argv_for, expected, facts_file, judged
from tests.simulate.trees import build

_RESULT = re.compile(r"^RESULT (\d+) (\w+) (-?\d+)\r?$", re.MULTILINE)

# Covers the files that /distrust names, executes what /jobs says (a count of words, and each with a NUL behind it), and
# prints how each ends.
_INIT = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void cover(const char *path, int number) {
    static char buffer[65536], copy[64];
    struct stat st;
    ssize_t count;
    int in = open(path, O_RDONLY);
    snprintf(copy, sizeof copy, "/untrusted/%d", number);
    int out = open(copy, O_WRONLY | O_CREAT, 0700);
    while ((count = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, count) != count) abort();
    if (fstat(in, &st) || fchmod(out, st.st_mode & 07777) || close(in) || close(out)) abort();
    if (mount(copy, path, NULL, MS_BIND, NULL)) abort();
}

static void execute(int number, char **argv) {
    int result[2], error = 0, status;
    if (pipe2(result, O_CLOEXEC)) abort();
    pid_t pid = fork();
    if (!pid) {
        int null = open("/tmp/null", O_RDWR);
        for (int fd = 0; fd < 3; fd++) dup2(null, fd);
        execv(argv[0], argv);
        error = errno;
        _exit(write(result[1], &error, sizeof error) != sizeof error);
    }
    close(result[1]);
    ssize_t count = read(result[0], &error, sizeof error);
    close(result[0]);
    waitpid(pid, &status, 0);
    if (count > 0)
        printf("RESULT %d errno %d\n", number, error);
    else
        printf("RESULT %d status %d\n", number, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    fflush(stdout);
}

int main(void) {
    char *line = NULL, *argv[4];
    size_t size = 0;
    int number = 0, words;
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("tmpfs", "/untrusted", "tmpfs", 0, NULL)) abort();
    for (FILE *names = fopen("/distrust", "r"); getline(&line, &size, names) > 0; number++) {
        line[strcspn(line, "\n")] = 0;
        cover(line, number);
    }
    FILE *jobs = fopen("/jobs", "r");
    for (number = 0; (words = fgetc(jobs)) > 0; number++) {
        memset(argv, 0, sizeof argv);
        for (int word = 0; word < words; word++) {
            size = 0;
            getdelim(&argv[word], &size, 0, jobs);
        }
        execute(number, argv);
    }
    reboot(RB_POWER_OFF);
}
"""


def build_tree(place: Path) -> Path:
    """Make the tree, with the program that executes the rest of it."""
    root = place / "root"
    build(root)
    (root / "tmp/null").touch()
    return root


def compare(program: Path, root: Path, place: Path, case: str) -> tuple[int, list[str]]:
    """Boot the tree on a kernel with a case's files distrusted; return how many were executed, and what differs."""
    facts = facts_file(place / "facts.toml", root, DISTRUSTED[case], others=True)
    # The module is none that a kernel would link.
    judgements = [found for found in judged(root, DENY, facts) if found.kind is not Kind.MODULE]
    image = _image(root, place, DISTRUSTED[case], judgements)
    command = [
        str(program), "mem=320M", f"initrd={image}", "con=null", "con0=fd:0,fd:1", "root=/dev/none", "panic=-1",
        "quiet",
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    ends = {int(number): [kind, int(value)] for number, kind, value in _RESULT.findall(done.stdout.decode("latin-1"))}
    differences = [
        f"{found.path!r}: said: {found.outcome.value} {found.answer} {found.reason}; came: {ends.get(number)}"
        for number, found in enumerate(judgements)
        if ends.get(number) != expected(found)
    ]
    return len(judgements), differences


def _image(root: Path, place: Path, distrusted: Sequence[str], judgements: Sequence[Judgement]) -> Path:
    tree = place / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    subprocess.run(["cp", "-a", root, tree], check=True, timeout=60)
    (tree / "untrusted").mkdir()
    (tree / "distrust").write_text("".join(f"/{name}\n" for name in distrusted))
    with (tree / "jobs").open("wb") as jobs:
        for found in judgements:
            words = argv_for(found)
            jobs.write(bytes([len(words)]) + b"".join(word + b"\0" for word in words))
    compiler: list[str | Path] = ["gcc", "-O1", "-static", "-x", "c", "-", "-o", tree / "init"]
    subprocess.run(compiler, input=_INIT.encode(), check=True, timeout=60)
    names = subprocess.run(["find", ".", "-print0"], cwd=tree, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    image = place / "image"
    with image.open("wb") as file:
        archive = ["cpio", "--quiet", "-0", "-o", "-H", "newc"]
        subprocess.run(archive, cwd=tree, input=names, stdout=file, check=True, timeout=60)
    return image
