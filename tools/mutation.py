"""Generic mutation of the privacy core: small changes of its source, one at a time, each of which some test must notice.

The changes are mutmut's, and a few more (`_more_operators`). mutmut's own runner leaves out what is decorated (properties, so every
noise scale), what is outside functions (every constant) and any list of equivalents, so the running is done here: a pytest that has
collected and run the tests once forks for every mutant, swaps the code of one function, and runs the tests that reach the line, the
quickest first. A change outside a function's body needs a fresh import: it runs in a fork from before anything of ours was imported.

    python tools/mutation.py                          # all of the core; exit 1 on a survivor that is not in the list of equivalents
    python tools/mutation.py privacy/ledger.py ...    # some files
    python tools/mutation.py --again out/mutation.jsonl  # what survived in an earlier run, and what is new

docs/mutation.md says what was found; docs/mutation-equivalents.toml is the list.
"""

import argparse
import ast
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import coverage
import libcst as cst
import libcst.matchers as m
import pytest
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "dpdistill"
EQUIVALENTS = ROOT / "docs" / "mutation-equivalents.toml"
CORE = ("privacy", "mechanisms")
TESTS = ("tests/privacy", "tests/mechanisms")
# By part of a name. What reads the source sees no change in memory, and what plants bugs has a copy of its own; the rest is slow.
LEFT_OUT = ("test_planted_bugs.py", "test_crash.py", "test_layout.py")
# Autograd's threads do not outlive a fork: what calls backward() would wait for ever.
LEFT_OUT += ("test_dp_sgd_through_the_door", "test_per_record_gradients_equal_one_backward_each")
SLOW = 1.0  # seconds of CPU: a slower test is left out
OWN = {  # the test file of a module, which is asked first, where it has another name
    **dict.fromkeys(("private", "recordwise", "gradients"), "test_door.py"),
    **dict.fromkeys(("disk", "faults"), "test_vault.py"),
    "ranks": "test_lockstep.py",
}
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"


@dataclass
class Mutant:
    """One change. `old` and `new` are the lines that differ, without indentation; with `file` and `scope` they are its name."""

    file: str
    scope: str
    line: int
    end: int
    old: str
    new: str
    source: str
    at_import: bool
    status: str = ""
    by: str = ""
    tests: int = 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.scope, self.old, self.new


# --- making mutants ---------------------------------------------------------------------------------------------------------------


def _fewer(node: cst.BaseString) -> Iterator[cst.BaseString]:
    """Of a text's mutants the first: upper and lower case are found by the same comparison."""
    yield from list(operator_string(node))[:1]


def _minus_one(node: cst.Integer) -> Iterator[cst.CSTNode]:
    if node.evaluated_value > 0:
        yield node.with_changes(value=repr(node.evaluated_value - 1))


def _decided(node: cst.If | cst.While) -> Iterator[cst.CSTNode]:
    for value in ("False",) if isinstance(node, cst.While) else ("False", "True"):
        if not m.matches(node.test, m.Name(value)):
            yield node.with_changes(test=cst.Name(value))


def _no_value(node: cst.Return) -> Iterator[cst.CSTNode]:
    if node.value is not None and not m.matches(node.value, m.Name("None")):
        yield node.with_changes(value=cst.Name("None"), whitespace_after_return=cst.SimpleWhitespace(" "))


def _no_call(node: cst.Expr) -> Iterator[cst.CSTNode]:
    if m.matches(node.value, m.Call() | m.Yield()):
        yield cst.Pass()


def _no_raise(node: cst.Raise) -> Iterator[cst.CSTNode]:
    yield cst.Pass()


OPERATORS: list[tuple[type, Callable[[Any], Iterable[cst.CSTNode]]]] = [
    *((kind, _fewer if operator is operator_string else operator) for kind, operator in mutation_operators),
    (cst.Integer, _minus_one),
    (cst.If, _decided),
    (cst.While, _decided),
    (cst.Return, _no_value),
    (cst.Expr, _no_call),
    (cst.Raise, _no_raise),
]


_ALIAS = m.Assign(
    targets=[m.AssignTarget(target=m.Name())],
    value=m.Subscript(value=m.Name("Literal") | m.Name("Callable") | m.Name("tuple") | m.Name("dict"))
    | m.Call(func=m.Name("TypeVar")),
)


class _Visitor(cst.CSTVisitor):
    """Collects (statement, node, new node, qualified name, whether it runs at import)."""

    METADATA_DEPENDENCIES = (PositionProvider, ByteSpanPositionProvider, ParentNodeProvider)

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, cst.CSTNode, str, bool]] = []
        self._names: list[str] = []
        self._bodies = 0
        self._statements: list[cst.CSTNode] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._names.append(node.name.value)
            self._statements.append(node)
        if isinstance(node, cst.Annotation | cst.Import | cst.ImportFrom):
            return False
        if m.matches(node, _ALIAS) and f"get_args({node.targets[0].target.value})" not in self._text:
            return False  # a type by another name: for a reader and a type checker only
        if isinstance(node, cst.SimpleStatementLine | cst.If | cst.While | cst.For | cst.With | cst.Try):
            self._statements.append(node)
        parent = self.get_metadata(ParentNodeProvider, node, None)
        if isinstance(parent, cst.FunctionDef) and node is parent.body:
            self._bodies += 1
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and self._statements:
                for new in operator(node):
                    found = (self._statements[-1], node, new, ".".join(self._names), self._bodies == 0)
                    self.found.append(found)
        # What a refusal says is no promise. A condition or a call is still taken away: only the text of the error stays.
        return not isinstance(node, cst.Raise)

    def on_leave(self, node: cst.CSTNode) -> None:
        parent = self.get_metadata(ParentNodeProvider, node, None)
        if isinstance(parent, cst.FunctionDef) and node is parent.body:
            self._bodies -= 1
        if self._statements and node is self._statements[-1]:
            self._statements.pop()
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._names.pop()


def _differing(before: list[str], after: list[str]) -> tuple[str, str]:
    """The lines from the first that differs to the last, of both, without indentation."""
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return "\n".join(map(str.strip, before)), "\n".join(map(str.strip, after))


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of a file of the core, in the order of its lines."""
    text = (SOURCE / file).read_text("utf-8")
    raw = text.encode()
    wrapper = MetadataWrapper(cst.parse_module(text))
    visitor = _Visitor(text)
    wrapper.visit(visitor)
    spans, positions = wrapper.resolve(ByteSpanPositionProvider), wrapper.resolve(PositionProvider)
    parents = wrapper.resolve(ParentNodeProvider)
    made: dict[str, Mutant] = {}
    for statement, node, new, scope, at_import in visitor.found:
        if isinstance(node, cst.Raise):  # under an `if`, it is the same as the condition taken for False
            block = parents[parents[node]]
            if isinstance(parents[block], cst.If) and len(getattr(block, "body", ())) == 1:
                continue
        if isinstance(node, cst.BaseString | cst.Expr) and m.matches(parents[node], m.Expr()):
            continue  # a docstring
        if isinstance(node, cst.If | cst.While):
            node, new = node.test, getattr(new, "test")  # noqa: B009
        span = spans[node]
        code = wrapper.module.code_for_node(new).strip().encode()
        changed = (raw[: span.start] + code + raw[span.start + span.length :]).decode()
        try:
            ast.parse(changed)
        except SyntaxError:
            continue
        if changed in made:
            continue
        old, new_text = _differing(text.splitlines(), changed.splitlines())
        first, last = positions[node].start.line, positions[node].end.line
        if isinstance(
            statement, cst.SimpleStatementLine
        ):  # a statement over several lines: any of them may be where it is counted
            first, last = positions[statement].start.line, positions[statement].end.line
        made[changed] = Mutant(file, scope, first, last, old, new_text, changed, at_import)
    return list(made.values())


# --- running them -----------------------------------------------------------------------------------------------------------------


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _silent() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)


def _in_fork(work: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str]]:
    """Runs work(tell) in a fork. Returns how it ended, as `os.waitstatus_to_exitcode`, and what it told."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.close(reading)
            os.setpgid(0, 0)  # what it forks itself ends with it
            _silent()
            _limits()
            work(lambda line: os.write(writing, line.encode() + b"\n"))
            code = 0
        except BaseException:
            pass
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8", errors="replace") as pipe:
        return _drain(pid, pipe)


def _drain(pid: int, pipe: io.TextIOBase) -> tuple[int, list[str]]:
    """Waits for the process itself, not for the pipe's end: what it forked may hold that open."""
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.set_blocking(pipe.fileno(), False)
    try:
        text = pipe.read() or ""
    except (OSError, TypeError):
        text = ""
    return os.waitstatus_to_exitcode(status), text.splitlines()


def _alarm(seconds: float) -> None:
    """Ends this process by a signal after so much CPU, or thirty times as much waiting."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, 1.5 + 8 * seconds)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 20 + 100 * seconds)


def _verdict(code: int, told: list[str]) -> tuple[str, str, int]:
    """(status, the test that noticed, how many tests ran)."""
    ran = [line[4:] for line in told if line.startswith("run ")]
    failed = [line[5:] for line in told if line.startswith("fail ")]
    last = ran[-1] if ran else "import"
    if failed:
        return KILLED, failed[0], len(ran)
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return TIMED_OUT, last, len(ran)
    if code:
        return KILLED, last, len(ran)
    return SURVIVED, "", len(ran)


def _passes(item: pytest.Item) -> bool:
    from _pytest.runner import runtestprotocol

    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


@dataclass
class Plugin:
    """Takes over once the tests are collected."""

    loop: Callable[[pytest.Session], None]
    chosen: Callable[[pytest.Item], bool] = lambda _: True
    collected: list[str] = field(default_factory=list)

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        # What failed need not be made small, nor explained. After tests/conftest.py, and before any test takes its settings.
        settings.register_profile("no shrinking", settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("no shrinking")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.chosen(item)]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.loop(session)
        return True


def _pytest(tests: Sequence[str], plugin: Plugin, basetemp: Path) -> int:
    arguments = [
        *tests,
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "timeout=0",
        "--capture=no",
        "--tb=native",
    ]
    arguments += [f"--basetemp={basetemp}", f"--rootdir={ROOT}"]
    return int(pytest.main(arguments, plugins=[plugin]))


class _Changed(importlib.abc.MetaPathFinder):
    """Imports one module of ours from other source than its file holds."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = "dpdistill." + mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self._path, self._source = str(SOURCE / mutant.file), mutant.source

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self._name:
            return None
        source, file = self._source, self._path

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return compile(source, file, "exec")

            def get_source(self, fullname: str) -> str:
                return source

        return importlib.machinery.ModuleSpec(
            name, Loader(name, file), origin=file, is_package=file.endswith("__init__.py")
        )


@dataclass
class Reach:
    """What the tests reach: file -> line -> names of tests, and the seconds of CPU of each."""

    lines: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]
    patience: float

    def tests(self, mutant: Mutant) -> list[str]:
        at = self.lines.get(mutant.file, {})
        stem = Path(mutant.file).stem
        own = OWN.get(stem, f"test_{stem}.py")
        if mutant.at_import:
            # Any test of the module may notice, also one that reads a constant and no more; a fresh import of few test files is quick.
            names = {name for name in self.seconds if own in name} or set().union(*at.values())
        else:
            names = set().union(*(at.get(line, set()) for line in range(mutant.line, mutant.end + 1)))
        taken, total = [], 0.0
        for name in sorted(names, key=lambda name: (own not in name, self.seconds[name])):
            if self.seconds[name] <= SLOW and total + self.seconds[name] <= self.patience:
                taken.append(name)
                total += self.seconds[name]
        return taken


class Runner:
    """Runs mutants, in forks of a pytest that is warm."""

    def __init__(self, session: pytest.Session, report: Callable[[Mutant], None], folder: Path) -> None:
        self._items = {item.nodeid: item for item in session.items}
        self._session, self._report, self._folder = session, report, folder
        self._killers: dict[tuple[str, str], list[str]] = defaultdict(list)

    def warm(self, patience: float) -> Reach:
        """Runs every test once, all of which must pass, and forgets what they cached."""
        data = coverage.Coverage(data_file=None, config_file=False, include=[f"{SOURCE}/{part}/*" for part in CORE])
        seconds: dict[str, float] = {}
        data.start()
        for name, item in self._items.items():
            data.switch_context(name)
            begun = time.process_time()
            if not _passes(item):
                raise SystemExit(f"{name} fails without any change")
            seconds[name] = time.process_time() - begun
        data.stop()
        self._control(seconds)
        for thing in gc.get_objects():
            if type(thing) is functools._lru_cache_wrapper:
                home = getattr(thing, "__module__", "") or ""
                if home.startswith(("dpdistill", "tests", "test_")) or home in _helpers():
                    thing.cache_clear()
        lines: dict[str, dict[int, set[str]]] = {}
        for path in data.get_data().measured_files():
            by_line = data.get_data().contexts_by_lineno(path)
            name = Path(path).relative_to(SOURCE).as_posix()
            lines[name] = {line: {context for context in contexts if context} for line, contexts in by_line.items()}
        return Reach(lines, seconds, patience)

    def _control(self, seconds: dict[str, float]) -> None:
        """Runs every test in a fork, without any change, as mutants are tried: one that fails there can show nothing, and is left out."""
        left = sorted((name for name in self._items if name in seconds), key=lambda name: seconds[name])
        while left:
            _, told = _in_fork(functools.partial(self._one, lambda: None, left, seconds))
            ran = [line[4:] for line in told if line.startswith("run ")]
            if len(ran) == len(left) and not told[-1].startswith("fail"):
                return
            print(f"left out, for it fails in a fork: {ran[-1]}", flush=True)
            seconds[ran[-1]] = math.inf
            left = left[len(ran) :]

    def warm_again(self, reach: Reach) -> Reach:
        """Where it is known what the tests reach: runs the quickest of each file, and those that are not known yet."""
        first = {}
        for name in sorted(reach.seconds, key=lambda name: reach.seconds[name]):
            first.setdefault(name.partition("::")[0], name)
        items = self._items
        unknown = [name for name in items if name not in reach.seconds]
        self._items = {name: items[name] for name in [*first.values(), *unknown] if name in items}
        found = self.warm(reach.patience)
        self._items = items
        for file, at in found.lines.items():
            for line, names in at.items():
                reach.lines.setdefault(file, {}).setdefault(line, set()).update(names)
        seconds = {name: reach.seconds.get(name, found.seconds.get(name, 0.0)) for name in items}
        lines = {f: {k: {n for n in names if n in items} for k, names in at.items()} for f, at in reach.lines.items()}
        return Reach(lines, seconds, reach.patience)

    def run(self, mutants: Iterable[Mutant], reach: Reach) -> None:
        functions = _functions()
        gc.collect()
        gc.freeze()  # or every fork copies what the collector touches
        for mutant in mutants:
            names = reach.tests(mutant)
            killers = [name for name in reversed(self._killers[mutant.file, mutant.scope]) if name in names][:3]
            order = [*dict.fromkeys(killers), *(name for name in names if name not in killers)]
            target = None if mutant.at_import else _swap(mutant, functions)
            if target is None and not mutant.at_import:
                mutant.at_import = True
                continue
            if target is None:
                continue
            work = functools.partial(self._one, target, order, reach.seconds)
            mutant.status, mutant.by, mutant.tests = _verdict(*_in_fork(work))
            if mutant.status == KILLED and mutant.by in self._items:
                self._killers[mutant.file, mutant.scope].append(mutant.by)
            shutil.rmtree(self._folder / "one", ignore_errors=True)
            self._report(mutant)

    def _one(
        self, target: Callable[[], None], order: list[str], seconds: dict[str, float], tell: Callable[[str], None]
    ) -> None:
        factory = self._session.config._tmp_path_factory  # type: ignore[attr-defined]
        (self._folder / "one").mkdir(exist_ok=True)
        factory._basetemp = self._folder / "one"
        target()
        for name in order:
            tell("run " + name)
            _alarm(seconds[name])
            if not _passes(self._items[name]):
                tell("fail " + name)
                return


def _read_reach(text: str, patience: float) -> Reach:
    found = json.loads(text)
    lines = {file: {int(line): set(names) for line, names in at.items()} for file, at in found["lines"].items()}
    return Reach(lines, found["seconds"], patience)


def _helpers() -> set[str]:
    return {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}


def _functions() -> dict[tuple[str, str], list[FunctionType]]:
    """Every function of the core by file and qualified name, decorated ones and methods too."""
    found: dict[tuple[str, str], list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename.startswith(str(SOURCE)):
            name = Path(thing.__code__.co_filename).relative_to(SOURCE).as_posix()
            found[name, thing.__code__.co_qualname].append(thing)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _swap(mutant: Mutant, functions: dict[tuple[str, str], list[FunctionType]]) -> Callable[[], None] | None:
    """Returns what puts the mutant's code into its function, or None where that takes a fresh import."""
    try:
        new = {code.co_qualname: code for code in _codes(compile(mutant.source, str(SOURCE / mutant.file), "exec"))}
    except (SyntaxError, ValueError):
        return None
    parts = mutant.scope.split(".")
    for length in range(1, len(parts) + 1):  # the outermost function: it holds the code of those within
        name = ".".join(parts[:length])
        there = functions.get((mutant.file, name), [])
        if there and name in new:
            code = new[name]
            if any(len(one.__code__.co_freevars) != len(code.co_freevars) for one in there):
                return None

            return functools.partial(_put, there, code)
    return None


def _put(functions: list[FunctionType], code: CodeType) -> None:
    for function in functions:
        function.__code__ = code


def run_fresh(mutant: Mutant, reach: Reach, folder: Path) -> None:
    """Runs a mutant of what happens at import, in a fork of this process, which has not imported anything of ours."""
    names = reach.tests(mutant)

    def loop(session: pytest.Session, tell: Callable[[str], None]) -> None:
        if session.testsfailed:  # a test file could not be imported; pytest would stop here
            tell("fail import")
            return
        items = {item.nodeid: item for item in session.items}
        for name in names:
            if name not in items:
                continue
            tell("run " + name)
            _alarm(reach.seconds[name])
            if not _passes(items[name]):
                tell("fail " + name)
                return
        tell("done")

    def work(tell: Callable[[str], None]) -> None:
        _alarm(10)
        sys.meta_path.insert(0, _Changed(mutant))
        files = sorted({name.partition("::")[0] for name in names})
        told: list[str] = []

        def both(line: str) -> None:
            told.append(line)
            tell(line)

        _pytest(files, Plugin(lambda session: loop(session, both)), folder / "one")
        if not told or (told[-1] != "done" and not told[-1].startswith("fail")):
            both("fail import")  # an error while importing or collecting

    mutant.status, mutant.by, mutant.tests = _verdict(*_in_fork(work))
    shutil.rmtree(folder / "one", ignore_errors=True)


# --- the command ------------------------------------------------------------------------------------------------------------------


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """The listed mutants that change nothing that is promised, with their reasons."""
    if not EQUIVALENTS.exists():
        return {}
    listed = {}
    for entry in tomllib.loads(EQUIVALENTS.read_text("utf-8")).get("equivalent", []):
        news = entry["new"] if isinstance(entry["new"], list) else [entry["new"]]
        for new in news:
            listed[entry["file"], entry["scope"], entry["old"], new] = entry["reason"]
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files of the core, e.g. privacy/ledger.py; all, where none is named")
    parser.add_argument("--again", type=Path, help="run only what survived in this earlier result, or is not in it")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "mutation.jsonl", help="where the result goes")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="files or folders of tests")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds of CPU for one mutant: the quickest tests that fit"
    )
    parser.add_argument(
        "--reach", type=Path, help="keeps here what the tests reach, and takes it from here the next time"
    )
    parser.add_argument("--new", action="store_true", help="with --again: leave out what survived, too")
    parser.add_argument("--count", action="store_true", help="only count the mutants")
    parser.add_argument("--limit", type=int, default=10**9, help="at most so many mutants of each file")
    options = parser.parse_args()
    os.chdir(ROOT)
    files = options.files or [
        p.relative_to(SOURCE).as_posix() for part in CORE for p in sorted((SOURCE / part).glob("*.py"))
    ]
    mutants = [mutant for file in files for mutant in mutants_of(file)[: options.limit]]
    if options.count:
        for file, n in Counter(mutant.file for mutant in mutants).items():
            print(f"{n:5d} {sum(mutant.at_import for mutant in mutants if mutant.file == file):5d} {file}")
        print(len(mutants))
        return 0
    known = equivalents()
    before: dict[tuple[str, ...], str] = {}
    if options.again:
        before = {tuple(row["key"]): row for row in map(json.loads, options.again.read_text().splitlines())}
        for mutant in mutants:
            row: Any = before.get(mutant.key)
            if row and (options.new or row["status"] != SURVIVED or mutant.key in known):
                mutant.status, mutant.by, mutant.tests = row["status"], row["by"], row["tests"]
    todo = [mutant for mutant in mutants if not mutant.status]
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    os.environ.pop("PYTEST_ADDOPTS", None)
    sys.path.insert(0, str(SOURCE.parent))
    late = (
        "torch.fx.experimental.symbolic_shapes"  # torch.func imports it at the first gradient: seconds, in every fork
    )
    for name in ("dp_accounting.pld", "dp_accounting.rdp", "scipy.stats", "torch.distributed", "torch.func", late):
        importlib.import_module(name)  # what is not ours, once, before any fork

    begun = time.monotonic()

    options.out.parent.mkdir(parents=True, exist_ok=True)

    def report(mutant: Mutant) -> None:
        facts = {
            "key": mutant.key,
            "line": mutant.line,
            "status": mutant.status,
            "by": mutant.by,
            "tests": mutant.tests,
        }
        with options.out.open("a") as file:
            file.write(json.dumps(facts) + "\n")
        if mutant.status == SURVIVED and mutant.key not in known:
            print(
                f"{mutant.file}:{mutant.line} {mutant.scope} [{mutant.tests} tests]\n  - {mutant.old}\n  + {mutant.new}",
                flush=True,
            )

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        results = folder / "results.json"

        def warm_work() -> None:
            # A pool of threads does not outlive a fork: its user would wait for ever.
            setattr(sys.modules["torch"], "set_num_threads", lambda _: None)  # noqa: B010

            def loop(session: pytest.Session) -> None:
                runner = Runner(session, report, folder)
                if options.reach and options.reach.exists():
                    reach = runner.warm_again(_read_reach(options.reach.read_text(), options.patience))
                else:
                    reach = runner.warm(options.patience)
                lines = {file: {str(k): sorted(v) for k, v in at.items()} for file, at in reach.lines.items()}
                text = json.dumps({"lines": lines, "seconds": reach.seconds})
                (folder / "reach.json").write_text(text)
                if options.reach:
                    options.reach.write_text(text)
                print(f"warm after {time.monotonic() - begun:.0f} s: {len(reach.seconds)} tests", flush=True)
                runner.run([mutant for mutant in todo if not mutant.at_import], reach)
                rows = [(mutant.status, mutant.by, mutant.tests, mutant.at_import) for mutant in todo]
                results.write_text(json.dumps(rows))

            chosen = lambda item: not any(part in item.nodeid for part in LEFT_OUT)  # noqa: E731
            code = _pytest(options.tests, Plugin(loop, chosen), folder / "warm")
            if not results.exists():
                raise SystemExit(f"pytest ended with {code} before the mutants were done")

        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                warm_work()
                status = 0
            except BaseException as error:
                print(repr(error), flush=True)
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        if status:
            return 1
        found = json.loads(results.read_text())
        for mutant, (state, by, tests, at_import) in zip(todo, found, strict=True):
            mutant.status, mutant.by, mutant.tests, mutant.at_import = state, by, tests, at_import
        reach = _read_reach((folder / "reach.json").read_text(), options.patience)
        for mutant in todo:
            if mutant.at_import:
                run_fresh(mutant, reach, folder)
                report(mutant)

    print(f"{'file':32} {'mutants':>8} {'killed':>8} {'timed out':>10} {'equivalent':>11} {'survived':>9}")
    for file in files:
        mine = [mutant for mutant in mutants if mutant.file == file]
        count = Counter("equivalent" if x.status == SURVIVED and x.key in known else x.status for x in mine)
        print(
            f"{file:32} {len(mine):8d} {count[KILLED]:8d} {count[TIMED_OUT]:10d} {count['equivalent']:11d} {count[SURVIVED]:9d}"
        )
    keys = {mutant.key for mutant in mutants}
    gone = [key for key in known if key[0] in files and key not in keys]
    killed = [x.key for x in mutants if x.key in known and x.status not in (SURVIVED, "")]
    for key in gone:
        print("listed as equivalent, and is no mutant any more:", key)
    for key in killed:
        print("listed as equivalent, and a test notices it (no harm):", key)
    print(f"{time.monotonic() - begun:.0f} s")
    return 1 if gone or any(x.status == SURVIVED and x.key not in known for x in mutants) else 0


if __name__ == "__main__":
    sys.exit(main())
