"""Write a sequence as a program that a person can type into a kernel and into the emulator.

It needs Python's standard library alone and does what the driver does, for it holds the driver's own functions, as many
of them as its steps need. A shell would not do: what it executed for each step would be judged and recorded as well.
"""

import ast
import inspect
import pprint
from collections.abc import Iterator
from types import ModuleType

from attrs import define, field

from ipe_emu.linux import syscalls
from tests.conformance import driver, media
from tests.conformance.generate import Step, concrete, reset
from tests.exec_hook import fsverity_steps
from tests.securityfs import acting, identities

_HEAD = '''\
#!/usr/bin/env python3
"""Prints the result of each step. As root, where tests/vectors/keys/builtin-trusted.pem is trusted.

On a kernel: mount -t securityfs none /sys/kernel/security, and run it; the records are in the kernel's log.
Under the emulator: ipe-emu run --kernel ... --boot-policy tests/vectors/boot-policy.pol --cmdline ipe.enforce=0
--builtin-keys tests/vectors/keys/builtin-trusted.pem --audit-log - -- python3 FILE
or beside a mounted one: python3 FILE DIRECTORY
Both, with the places on /mnt that steps may name: python -m scripts.conformance --script FILE --way WAY
"""

'''
_TAIL = """

if "SCRATCH" in globals():
    Path(SCRATCH).mkdir(parents=True, exist_ok=True)
driver = Driver(Path(sys.argv[1] if len(sys.argv) > 1 else "/sys/kernel/security"))
for number, step in enumerate(STEPS):
    print(f"{number} {step['op']}: {json.dumps(attempt(driver, step))}", flush=True)
"""
#: In the place of ipe_emu.linux.syscalls.call and its table.
_CALL = """

def call(name: str, *arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = (ctypes.c_long, *[ctypes.c_void_p] * len(arguments))
    result: int = libc.syscall(NUMBERS[name], *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result
"""


def script(sequence: list[Step], base: int, *, enforce: str = "1") -> str:
    """The program; its first step brings the machine to where every sequence starts."""
    steps = [reset(base, enforce=enforce), *(concrete(step, base) for step in sequence)]
    carved = _Carved()
    carved.need("Driver.__init__", "attempt", "Driver.act", *(f"Driver.do_{operation}" for operation in _done(steps)))
    listed = "\n\nSTEPS = [\n"
    for number, (step, planned) in enumerate(zip(steps, [reset(base), *sequence], strict=True)):
        listed += f"    # {number}\n" + "".join(f"    #   {line}\n" for line in _texts(planned, base))
        listed += "".join(f"    {line}\n" for line in (pprint.pformat(step, width=110) + ",").splitlines())
    return _HEAD + carved.text() + listed + "]\n" + _TAIL


def _done(steps: list[Step]) -> Iterator[str]:
    for step in steps:
        yield step["op"]
        if "each" in step:
            yield step["each"]["op"]


def _texts(step: Step, base: int) -> Iterator[str]:
    """What a person wants to know of payloads that are only octets in the step."""
    for payload in (*step.get("payloads", ()), step.get("payload"), step.get("payload_file")):
        if payload and "text" in payload:
            how = ", ".join(f"{key} {value}" for key, value in payload.items() if key != "text") or "not signed"
            yield f"({how})"
            yield from (repr(line)[1:-1] for line in payload["text"].replace("{base}", str(base)).split("\n"))


#: Where a driver's functions are from, in the order in which they can be defined.
_MODULES: tuple[ModuleType, ...] = (syscalls, media, fsverity_steps, identities, acting, driver)
_CLASSES = ("Actor", "Driver")


@define
class _Carved:
    """What of the modules' top levels, and of the two classes, is needed for something."""

    _needed: set[str] = field(factory=set, init=False)
    _calls: set[str] = field(factory=set, init=False)
    _imports: dict[str, str] = field(factory=dict, init=False)
    _sources: dict[str, str] = field(factory=dict, init=False)
    _defined: dict[str, ast.stmt] = field(init=False)

    @_defined.default
    def _read(self) -> dict[str, ast.stmt]:
        defined: dict[str, ast.stmt] = {}
        for module in _MODULES:
            source = inspect.getsource(module)
            for statement in ast.parse(source).body:
                for name in self._named(statement):
                    defined[name] = statement
                    self._sources[name] = _segment(source, statement)
                if isinstance(statement, ast.ClassDef):
                    for method in statement.body:
                        if isinstance(method, ast.FunctionDef):
                            defined[f"{statement.name}.{method.name}"] = method
                            self._sources[f"{statement.name}.{method.name}"] = _segment(source, method)
        return defined

    def _named(self, statement: ast.stmt) -> Iterator[str]:
        match statement:
            case ast.FunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Assign(targets=targets):
                for target in targets:
                    names = target.elts if isinstance(target, ast.Tuple) else [target]
                    yield from (name.id for name in names if isinstance(name, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import(names=names):
                self._imports |= {alias.name.partition(".")[0]: f"import {alias.name}" for alias in names}
            case ast.ImportFrom(module=module, names=names):
                if str(module).partition(".")[0] not in ("tests", "ipe_emu"):
                    self._imports |= {alias.name: f"from {module} import {alias.name}" for alias in names}

    def need(self, *names: str) -> None:
        """Take in what these are made of; the names that nothing is known of are built in, or imported."""
        for name in names:
            if name in _CLASSES or name in self._needed or name not in self._defined:
                # A method may be the other class's.
                other = name.replace("Driver.", "Actor.")
                if other != name and other in self._defined and other not in self._needed:
                    self.need(other)
                if name in self._imports:
                    self._needed.add(name)
                continue
            self._needed.add(name)
            if name == "call":
                self.need("ctypes", "Any")
                continue
            if name.startswith("Driver."):
                self.need(name.replace("Driver.", "Actor."))
            self.need(*self._used_by(self._defined[name]))

    def _used_by(self, statement: ast.stmt) -> Iterator[str]:
        own = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        own |= {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(statement):
            match node:
                case ast.Call(func=ast.Name(id="call"), args=[ast.Constant(value=str(name)), *_]):
                    self._calls.add(name)
                    yield "call"
                case ast.Name(id=name) if name not in own:
                    yield name
                case ast.Attribute(value=ast.Name(id="self" | "driver"), attr=name):
                    yield f"Driver.{name}"

    def text(self) -> str:
        """The whole as a module's source, without its steps."""
        self.need("sys", "json", "Path", "os")
        imports = sorted({self._imports[name] for name in self._needed if name in self._imports})
        text = "\n".join(imports) + "\n"
        if self._calls:
            text += f"\nNUMBERS = { ({name: syscalls.NUMBERS[name] for name in sorted(self._calls)}) }\n" + _CALL
        done: set[str] = set()
        gap = "\n\n"
        for name in self._defined:
            if name in _CLASSES:
                base = "(Actor)" if name == "Driver" else ""
                methods = [self._sources[m] for m in self._defined if m.startswith(name + ".") and m in self._needed]
                text += f"\n\nclass {name}{base}:\n" + "\n\n".join(methods) + "\n"
                gap = "\n\n"
            elif name in self._needed and "." not in name and name != "call" and self._sources[name] not in done:
                done.add(self._sources[name])
                is_function = isinstance(self._defined[name], ast.FunctionDef)
                text += ("\n\n" if is_function else gap) + self._sources[name] + "\n"
                gap = "\n\n" if is_function else ""
        return text


def _segment(source: str, statement: ast.stmt) -> str:
    """A statement's lines, with its decorators."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(source.splitlines()[first - 1 : statement.end_lineno])
