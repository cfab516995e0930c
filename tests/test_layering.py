"""The house rules of DESIGN: who may import whom, where ctypes lives, and what no file may hold."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: From the bottom up: a part may import its own layer and those below. ``linux`` is a leaf beside them.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "__init__"}),
    frozenset({"event", "policy", "pkcs7", "keyring", "integrity", "audit", "profiles"}),
    frozenset({"lsm", "ima", "kernel_cmdline", "system_keyrings"}),
    frozenset({"binfmt"}),
    frozenset({"volumes"}),
    frozenset({"ipe_securityfs", "exec_hook", "simulate"}),
    frozenset({"rehearse"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
MODEL_LAYER = 2
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
MODEL_MAY_IMPORT = {"attrs", "cryptography", "ipe_emu"}
#: attrs is how every value of this project is written; beyond it, linux is the standard library.
LINUX_MAY_IMPORT = sys.stdlib_module_names | {"attrs"}
TOP_LEVEL = {"pyproject.toml", "ipe_emu", "fs", "tests", "scripts", "Makefile", "README.md", "LICENSE"}


def sources() -> list[Path]:
    return sorted(p for top in ("ipe_emu", "fs/ipe_securityfs") for p in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "fs" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def imports(path: Path) -> frozenset[tuple[str, bool]]:
    """Every module a file imports, anywhere in it; and whether that happens when the file itself is imported."""
    tree = ast.parse(path.read_bytes())
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    at_once = {id(node) for node in _executed_at_import(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in at_once) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found.add((module, id(node) in at_once))
            found |= {(f"{module}.{alias.name}", id(node) in at_once) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            # A computed name is as good as its constant start.
            start = name.values[0] if isinstance(name, ast.JoinedStr) else name
            assert isinstance(start, ast.Constant), f"{path}: imports a module whose name cannot be read here"
            found.add((str(start.value).rstrip("."), False))
    return frozenset(found)


def _executed_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def part_of(module: str) -> str | None:
    """The part of the house a module belongs to; None if it is none of ours."""
    words = module.split(".")
    if words[0] == "ipe_emu":
        return words[1] if len(words) > 1 else "__init__"
    return words[0] if words[0] == "ipe_securityfs" else None


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_point_down(path: Path) -> None:
    part = part_of(module_of(path))
    assert part is not None
    for module, _ in imports(path):
        target = part_of(module)
        if part == "linux":
            assert target in (None, "linux", "errors", "__init__"), f"linux is a leaf and imports {module}"
            assert target is not None or module.split(".")[0] in LINUX_MAY_IMPORT, module
        elif target in RANK:
            assert RANK[target] <= RANK[part], f"{part} imports {module}"
        elif target is not None and target != "linux":
            # "from ipe_emu import NAME": NAME is a value of the package, not a part.
            assert not (ROOT / "ipe_emu" / target).exists(), f"{target} has no layer"
            assert not (ROOT / "ipe_emu" / f"{target}.py").exists(), f"{target} has no layer"
        if RANK.get(part, len(LAYERS)) <= MODEL_LAYER:
            assert target != "linux", f"{part} imports {module}"
            top = module.split(".")[0]
            assert top in MODEL_MAY_IMPORT or top in sys.stdlib_module_names, f"{part} imports {module}"


def test_the_walk_sees_lazy_and_relative_and_computed_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "ipe_emu" / "policy" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a\nfrom . import b\nfrom ..linux import c\nimport importlib\n"
        "def f():\n    import d\n    importlib.import_module(f'ipe_emu.cli.{a}')\n"
    )
    found = dict(imports(file))
    assert found == {
        "a": True,
        "importlib": True,
        "ipe_emu.policy": True,
        "ipe_emu.policy.b": True,
        "ipe_emu.linux": True,
        "ipe_emu.linux.c": True,
        "d": False,
        "ipe_emu.cli": False,
    }


def test_no_import_cycles() -> None:
    modules = {module_of(path): path for path in sources()}
    graph = {
        name: {m for m, at_once in imports(path) if at_once and m in modules and m != name}
        # A package is imported before what is in it; that is no cycle of its own.
        - {name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def imported_with(module: str) -> set[str]:
    """Every module of ours that is there as soon as ``module`` is imported."""
    files = {module_of(path): path for path in sources()}
    found: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        above = {name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)}
        waiting |= ({m for m, at_once in imports(files[name]) if at_once} | above) & files.keys() - found
    return found


def test_a_boot_begins_without_what_it_may_never_need() -> None:
    late = {"rehearse.agent", "rehearse.machine", "rehearse.image.rootfs", "rehearse.device_mapper", "volumes.ext4"}
    assert imported_with("ipe_emu.rehearse.boot") & {f"ipe_emu.{name}" for name in late} == set()


def test_the_processes_of_a_machine_import_nothing_once_they_have_given_up_their_ids() -> None:
    """Our own files may be closed to them then."""
    there = imported_with("ipe_emu.rehearse.agent")
    needed = {"machine", "command", "image.rootfs", "image.archive", "image.compression"}
    assert there >= {f"ipe_emu.rehearse.{name}" for name in needed}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_ctypes_only_in_linux(path: Path) -> None:
    uses = {module.split(".")[0] for module, _ in imports(path)}
    assert part_of(module_of(path)) == "linux" or not uses & {"ctypes", "cffi", "_ctypes"}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_no_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call):
            assert not any(k.arg == "shell" for k in node.keywords), f"line {node.lineno}: a shell"
            assert ast.unparse(node.func) not in {"os.system", "os.popen"}, f"line {node.lineno}: a shell"


def tracked_texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    names = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    return [p for p in names if p.is_file() and p.suffix not in {".xz", ".p7b", ".der"}]


@pytest.mark.parametrize("path", tracked_texts(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_holds_what_belongs_nowhere(path: Path) -> None:
    text = path.read_text(errors="surrogateescape")
    places = [re.escape("/wor" + "k/"), re.escape("/tmp/" + "venv"), r"(?<![\w}])/ro" + "ot/", "/ho" + r"me/\w"]
    for unwanted in ("TO" + "DO", "FIX" + "ME", "X" * 3 + ":", *places):
        assert not re.search(unwanted, text), f"holds {unwanted}"


def test_the_top_level_is_what_design_says() -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in tracked_texts()}
    assert {top for top in tops if not top.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("command", ["check", "show"])
def test_policy_commands_import_nothing_slow(command: str, tmp_path: Path) -> None:
    policy = tmp_path / "a.pol"
    policy.write_text(
        "policy_name=a policy_version=1.0.0\nDEFAULT action=DENY\nop=EXECUTE boot_verified=TRUE action=ALLOW\n"
    )
    program = (
        "import sys; from ipe_emu.cli import main; status = main(sys.argv[1:]);"
        "print(sorted({m.split('.')[0] for m in sys.modules} &"
        " {'trio', 'pyfuse3', 'rich', 'cryptography', 'ipe_securityfs', 'ctypes', 'asyncio'}), file=sys.stderr);"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "policy", command, str(policy)],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'fs'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
