"""Every hostile or malformed input that has a name, in one place: what to write, what to type, and what must come of it.

Data sets are in hostile_data.py and ONNX graphs in small_models.py; here they become commands, beside settings, ledgers, targets,
teachers, figures and releases. What all of them have in common is checked in tests/hostile/test_named.py: exit code 2, one
printable line that names the file, and nothing on disk changed.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hostile_data
import small_models
import small_release
from dpdistill.errors import printable

Words = Sequence[object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that must be refused.

    Attributes:
      make: writes into an empty folder, from where the command is given, and returns what to type.
      names: what the line names: the file or setting at fault; empty where any part of a folder may be named.
      says: a part of the reason, where it matters that it is this one.
      code: 2; `verify` answers 1, with its lines on stdout.
      file_bytes: the most bytes that a file may have while it runs, as on a full disk.
      leaves: what the command may touch: the home of ledgers, where a charge was refused after the ledger was begun.
    """

    make: Callable[[Path], Words]
    names: str = ""
    says: str = ""
    code: int = 2
    file_bytes: int | None = None
    leaves: tuple[str, ...] = ()


def private(root: Path) -> str:
    """Thirteen plain images of two classes."""
    hostile_data.legal()(root)
    return "x.npz"


def raw(path: Path, data: bytes | str | int) -> Path:
    """Writes a file: bytes, text, or a number of zeros that take no room on disk."""
    with open(path, "wb") as file:
        if isinstance(data, int):
            file.truncate(data)
        else:
            file.write(data if isinstance(data, bytes) else data.encode())
    return path


# --- data sets

# IDX files and links hold no class list; the path is that of the file at fault.
DATA = {
    f"data: {name}": Case(
        make=lambda root, make=make, name=name: (
            ["dataset", "--data", make(root)] + (["--classes", 3] if "idx" in name else [])
        ),
        names=str(os.sep),
    )
    for name, make in hostile_data.CASES.items()
}


def ids(root: Path, values: Any) -> Words:
    hostile_data.legal(owner=values)(root)
    return ["model", "--data", "x.npz", "--shards", 2, "--id-column", "owner"]


DATA |= {
    "data: ids with NaN": Case(make=lambda root: ids(root, np.full(13, np.nan)), names="x.npz", says="owner"),
    "data: ids for half of the records": Case(make=lambda root: ids(root, np.arange(6)), names="x.npz", says="owner"),
    "data: ids that are objects": Case(make=lambda root: ids(root, np.array([object()] * 13)), names="x.npz"),
    "data: ids beyond Unicode": Case(
        make=lambda root: ids(root, np.full(13, 0x7FFFFFFF, np.uint32).view("U1")), names="x.npz"
    ),
    "data: auxiliary is a bomb": Case(
        make=lambda root: [
            "dataset", "--data", private(root), "--auxiliary", raw(root / "a.npz", hostile_data.NPZ["decompression bomb"]())
        ],
        names="a.npz",
        says="bomb",
    ),
}  # fmt: skip


# --- settings


def config(text: bytes | str | int, **more: Any) -> Case:
    """A case of a TOML file."""

    def make(root: Path) -> Words:
        private(root)
        return [more.get("verb", "dataset"), "--config", raw(root / "c.toml", text)]

    return Case(make=make, names=more.get("names", "c.toml"), says=more.get("says", ""))


def typed(*words: object, says: str = "", names: str = "") -> Case:
    """A case of flags on plain data."""
    return Case(make=lambda root: ["dataset", "--data", private(root), *words], says=says, names=names)


DATA_LINE = 'data = "x.npz"\n'
SETTINGS = {
    "config: missing": Case(make=lambda root: ["dataset", "--config", "c.toml"], names="c.toml", says="does not exist"),
    "config: a folder": Case(make=lambda root: ["dataset", "--config", root], says="not a regular file"),
    "config: a pipe": Case(
        make=lambda root: ["dataset", "--config", hostile_data.special(root / "c.toml", "pipe")], names="c.toml"
    ),
    "config: a device": Case(make=lambda root: ["dataset", "--config", "/dev/zero"], names="/dev/zero"),
    "config: empty": config(b"", says="empty"),
    "config: 2 GiB": config(2**31, says="too large"),
    "config: no TOML": config("epsilon 3"),
    "config: a PNG": config(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "config: not UTF-8": config(b"\xff\xfe"),
    "config: with a BOM": config(b"\xef\xbb\xbf" + DATA_LINE.encode()),
    "config: in UTF-16": config(DATA_LINE.encode("utf-16")),
    "config: a key twice": config(DATA_LINE * 2),
    "config: nested 8,000 deep": config("a = " + "[" * 8000),
    "config: tables nested 3,000 deep": config("a = " + "{a=" * 3000),
    "config: a key of 8,000 parts": config("a" + ".a" * 8000 + " = 1"),
    "config: a key of 30,000 parts": config("a" + ".a" * 30_000 + " = 1", says="too large"),
    "config: a number of 10,000 digits": config(DATA_LINE + "epsilon = " + "9" * 10_000),
    "config: a number of 10,000 hex digits": config(DATA_LINE + "epsilon = 0x" + "F" * 10_000, says="vast"),
    "config: text of 10,000 digits": config(DATA_LINE + 'per_class = "' + "9" * 10_000 + '"'),
    "config: a key with escape codes": config('"a\\u001b[2J\\u202e\\nb" = 1'),
    "config: a key of 10,000 letters": config("a" * 10_000 + " = 1"),
    "config: a misspelt key": config(DATA_LINE + "epsilonn = 1.0", says="did you mean epsilon?"),
    "config: a misspelt setting": config(DATA_LINE + "[settings]\nstepz = 1", names="stepz", says="did you mean settings.steps?"),
    "config: settings that are no table": config(DATA_LINE + "settings = 3"),
    "config: settings twice": config(DATA_LINE + "[[settings]]"),
    "config: a date for a number": config(DATA_LINE + "[settings]\nsteps = 1979-05-27", names="settings.steps"),
    "config: a list for a path": config(DATA_LINE + 'out = ["a"]'),
    "config: data of NUL": config('data = "x\\u0000.npz"'),
    "config: out of NUL": config(DATA_LINE + 'out = "a\\u0000b"'),
    "config: ledger of NUL": config(DATA_LINE + 'ledger = "a\\u0000b"'),
    "config: teachers of NUL": config('teachers = "a\\u0000b"', verb="model"),
    "config: teacher of NUL": config('teacher = "a\\u0000.onnx"', verb="model"),
    "config: no data": config("epsilon = 1.0", says="missing: data"),
    **{
        f"config: {key} = {value}": config(f"{DATA_LINE}{key} = {value}", names=key)
        for key, value in (
            ("epsilon", "nan"), ("epsilon", "inf"), ("epsilon", "0"), ("epsilon", "-1.0"), ("epsilon", "1e400"), ("epsilon", "true"),
            ("epsilon", "1e-320"), ("delta", "0.0"), ("delta", "1.0"), ("delta", "-1e-5"), ("delta", "nan"), ("delta", "1e-320"),
            ("per_class", "0"), ("per_class", "1001"), ("per_class", "2.5"), ("seed", "-1"), ("seed", "1000000000000000000000"),
            ("classes", "0"), ("classes", "1000000000"), ("resize", "7"), ("resize", "1000000000000000000000"),
            ("budget", "nan"), ("budget", "0.5"), ("device", '"tpu"'), ("method", '"joined"'),
        )
    },
    "--set sigma=0": typed("--method", "dosser", "--set", "noise_multiplier=0"),
    "--set without a value": typed("--set", "steps", says="name=value"),
    "--set of NaN": typed("--set", "procedural=nan", says="procedural"),
    "--set of 10^400": typed("--set", "steps=1" + "0" * 400, says="steps"),
    "--epsilon nan": typed("--epsilon", "nan", says="epsilon"),
    "--epsilon inf": typed("--epsilon", "inf", says="epsilon"),
    "--delta 1": typed("--delta", 1, says="delta"),
    "more images than a release holds": Case(
        make=lambda root: ["dataset", "--data", _wide(root), "--per-class", 400],
        says="more than the 256 MiB",
    ),
}  # fmt: skip


def _wide(root: Path) -> Path:
    names = np.array([f"class {k}" for k in range(100)])
    np.savez(root / "x.npz", images=np.zeros((9, 64, 64, 3), np.uint8), labels=np.zeros(9, int), classes=names)
    return root / "x.npz"


# --- where results go


def target(*words: object, make: Callable[[Path], object] = lambda root: None, **facts: Any) -> Case:
    """A case of plain data and a place that cannot be."""

    def made(root: Path) -> Words:
        data = private(root)
        make(root)
        return ["dataset", "--data", data, *words]

    return Case(make=made, **facts)


TARGETS = {
    "out: an existing file": target("--out", "x.npz", names="x.npz", says="choose another --out"),
    "out: an existing folder": target("--out", "d", make=lambda root: (root / "d").mkdir(), names="d"),
    "out: a dangling link": target("--out", "d", make=lambda root: (root / "d").symlink_to("nowhere"), names="d"),
    "out: here": target("--out", "."),
    "out: empty": target("--out", ""),
    "out: the root": target("--out", "/"),
    "out: in a file": target("--out", "x.npz/out", names="x.npz", says="choose another --out"),
    "out: a folder with a pipe for its settings": target(
        "--out", "d", make=lambda root: ((root / "d").mkdir(), os.mkfifo(root / "d" / "config.toml")), names="d"
    ),
    "out: a state with a pipe for its name": target(
        "--out", "d", make=lambda root: ((root / "d.state").mkdir(), os.mkfifo(root / "d.state" / "run.json")), names="d.state"
    ),
    "out: a state of other settings": target(
        "--out", "d", make=lambda root: ((root / "d.state").mkdir(), raw(root / "d.state" / "run.json", b"{}")), names="d.state"
    ),
    "out: a name of 5,000 letters": target("--out", "o" * 5000),
    "disk full: no home for ledgers": target(file_bytes=0, says="no place for ledgers", leaves=("home",)),
    "disk full: no room for the ledger's first line": target(
        file_bytes=100, says="could not be read or written", leaves=("home",)
    ),
}  # fmt: skip


# --- ledgers


def ledger(data: bytes | int | Callable[[Path], object], says: str = "", name: str = "l.jsonl") -> Case:
    """A case of a ledger: its bytes, or what makes it."""

    def make(root: Path) -> object:
        return data(root / name) if callable(data) else raw(root / name, data)

    return target("--ledger", name, make=make, names=name, says=says)


def _good_ledger() -> bytes:
    """A genuine one, of three runs' lines."""
    body: list[dict[str, Any]] = [
        {"type": "open", "format": "dpdistill-ledger-1", "data": "toy", "unit": "record", "relation": "add_or_remove_one",
         "cap_epsilon": "3.0", "cap_delta": "1e-05"},
        {"type": "run", "run": "run-a", "method": "joint", "config": "0" * 64},
    ]  # fmt: skip
    return small_release.Kit.chain(body)


def _first(**fields: Any) -> bytes:
    opening = json.loads(_good_ledger().split(b"\n")[0])
    return small_release.Kit.chain([opening | fields])


GOOD_LEDGER = _good_ledger()
LEDGERS = {
    "ledger: another file, without a newline": ledger(b"Dear Diary, nobody may cut this.", "not one of our ledgers"),
    "ledger: another file, with newlines": ledger(b"a,b\n1,2\n"),
    "ledger: a JSON file": ledger(b'{"a": 1}'),
    "ledger: the private data": target("--ledger", "x.npz", names="x.npz"),
    "ledger: zeros": ledger(2**20),
    "ledger: 64 MiB and a byte": ledger(2**26 + 1),
    "ledger: 1 TiB": ledger(2**40),
    "ledger: newlines only": ledger(b"\n" * 2**20),
    "ledger: a folder": ledger(Path.mkdir, "Is a directory"),
    "ledger: a pipe": ledger(os.mkfifo),
    "ledger: a device": target("--ledger", "/dev/full", names="/dev/full"),
    "ledger: in the release": target("--out", "d", "--ledger", "d/l.jsonl", names="d/l.jsonl", says="outside"),
    "ledger: in a file": target("--ledger", "x.npz/l", names="x.npz"),
    "ledger: a name of 5,000 letters": target("--ledger", "l" * 5000),
    "ledger: the first line is gone": ledger(GOOD_LEDGER.split(b"\n", 1)[1], "line 1"),
    "ledger: a changed letter": ledger(GOOD_LEDGER.replace(b"toy", b"tox"), "line 1"),
    "ledger: with a BOM": ledger(b"\xef\xbb\xbf" + GOOD_LEDGER, "line 1"),
    "ledger: in UTF-16": ledger(GOOD_LEDGER.decode().encode("utf-16"), "not one of our ledgers"),
    "ledger: with Windows newlines": ledger(GOOD_LEDGER.replace(b"\n", b"\r\n"), "line 1"),
    "ledger: nested 100,000 deep": ledger(b"[" * 100_000 + b"\n", "not one of our ledgers"),
    "ledger: a key twice": ledger(GOOD_LEDGER.replace(b'{"cap_delta"', b'{"cap_delta":"1","cap_delta"', 1), "line 1"),
    "ledger: NaN": ledger(GOOD_LEDGER.replace(b'"3.0"', b"NaN", 1), "line 1"),
    "ledger: 1e400": ledger(GOOD_LEDGER.replace(b'"3.0"', b"1e400", 1), "line 1"),
    "ledger: a number of 5,000 digits": ledger(GOOD_LEDGER.replace(b'"3.0"', b"9" * 5000, 1), "line 1"),
    "ledger: escape codes": ledger(b'{"type":"\x1b[2J"}\n', "not one of our ledgers"),
    "ledger: a cap of NaN, its chain whole": ledger(_first(cap_epsilon="nan"), "a cap that is none"),
    "ledger: a cap of 1e400, its chain whole": ledger(_first(cap_epsilon="1e400"), "a cap that is none"),
    "ledger: another format, its chain whole": ledger(_first(format="\u202ex"), "format"),
    "ledger: another unit, its chain whole": ledger(_first(unit="hospital"), "counts by one unit"),
    "ledger: a field of another kind, its chain whole": ledger(_first(data=[]), "another kind"),
}


# --- teachers

SURE = ("--attested-epsilon", 1, "--attested-delta", 1e-5)


def teacher(name: str, data: bytes | int | Callable[[Path], object], *words: object, says: str = "") -> Case:
    """A case of a model's file: its bytes, or what makes it."""

    def make(root: Path) -> Words:
        _ = data(root / name) if callable(data) else raw(root / name, data)
        return ["model", "--teacher", name, *SURE, *words]

    return Case(make=make, names=printable(name), says=says)


def weights(data: bytes | int, says: str = "") -> Case:
    """A case of a safetensors file of a network of one layer."""
    return teacher("t.safetensors", data, "--architecture", "torch.nn:Identity", "--shape", "3,8,8", says=says)


def _st(header: str, data: bytes = b"") -> bytes:
    return small_models.raw_safetensors(header, data)


ONE = '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'
TEACHERS = {
    **{
        f"onnx: {name}": teacher("t.onnx", model if isinstance(model, bytes) else model.SerializeToString())
        for name, (model, _) in small_models.CASES.items()
    },
    "onnx: 1 GiB of zeros": teacher("t.onnx", 2**30, says="too large"),
    "onnx: 256 MiB of zeros": teacher("t.onnx", 2**28),
    "onnx: a pipe": teacher("t.onnx", os.mkfifo, says="not a regular file"),
    "onnx: a device": teacher("t.onnx", lambda path: path.symlink_to("/dev/zero"), says="not a regular file"),
    "onnx: empty": teacher("t.onnx", b"", says="empty"),
    "onnx: a name that turns around": teacher("t\u202exnno.onnx", b"x", says="invisible"),
    "onnx: another shape": teacher("t.onnx", small_models.made().SerializeToString(), "--shape", "1,28,28"),
    "onnx: another number of classes": teacher("t.onnx", small_models.made().SerializeToString(), "--classes", 7),
    "a pickle that calls os.system": teacher("t.pt", b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.", says="ONNX"),
    "a Keras file": teacher("t.h5", b"\x89HDF\r\n\x1a\n", says="ONNX"),
    "a folder for a teacher": teacher("t", Path.mkdir, says="folder"),
    "safetensors: a header of 2^60 bytes": weights(struct.pack("<Q", 2**60) + b"{}", "header"),
    "safetensors: 256 MiB of zeros": weights(2**28),
    "safetensors: 1 GiB of zeros": weights(2**30, "too large"),
    "safetensors: cut": weights(_st(ONE % ("2", "0,8"), bytes(4)), "damaged"),
    "safetensors: trailing bytes": weights(_st(ONE % ("1", "0,4"), bytes(8)), "damaged"),
    "safetensors: a hole": weights(_st(ONE % ("1", "4,8"), bytes(8)), "damaged"),
    "safetensors: an overlap": weights(
        _st('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "damaged",
    ),
    "safetensors: a shape that overflows": weights(_st(ONE % ("4294967296,4294967296", "0,0")), "damaged"),
    "safetensors: a negative shape": weights(_st(ONE % ("-1", "0,4"), bytes(4)), "damaged"),
    "safetensors: a key twice": weights(_st((ONE % ("1", "0,4"))[:-1] + ',"a":{}}', bytes(4)), "two tensors"),
    "safetensors: NaN": weights(_st(ONE % ("1", "0,4"), b"\0\0\xc0\x7f"), "not finite"),
    "safetensors: an unknown type": weights(_st(ONE.replace("F32", "F33") % ("1", "0,4"), bytes(4)), "damaged"),
    "safetensors: 400,000 empty tensors": weights(
        _st(json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(400_000)})), "header"
    ),
    "safetensors: 20,001 empty tensors": weights(
        _st(json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_001)})), "20,000"
    ),
    "safetensors: nested 100,000 deep": weights(_st("[" * 100_000), "damaged"),
    "safetensors: a header that is no object": weights(_st("[]"), "damaged"),
    "safetensors: not UTF-8": weights(struct.pack("<Q", 2) + b"\xff\xfe", "damaged"),
    "safetensors: names not of the network": weights(_st(ONE % ("1", "0,4"), bytes(4)), "not of the network"),
    "safetensors without its network": teacher("t.safetensors", _st("{}"), says="without their network"),
    "an architecture that is a call": Case(
        make=lambda root: [
            "model", "--teacher", raw(root / "t.safetensors", _st("{}")), *SURE, "--architecture", "os:system('x')", "--shape", "3,8,8"
        ],
        says="is not an architecture",
    ),
    "teachers: a file": Case(make=lambda root: ["model", "--teachers", raw(root / "t", b"x")], names="t"),
    "teachers: an empty folder": Case(make=lambda root: ["model", "--teachers", _folder(root, 0)], says="0 models"),
    "teachers: two pipes": Case(make=lambda root: ["model", "--teachers", _folder(root, 2)], says="regular file"),
}  # fmt: skip


def _folder(root: Path, pipes: int) -> Path:
    (root / "t").mkdir()
    for number in range(pipes):
        os.mkfifo(root / "t" / f"{number}.onnx")
    return root / "t"


# --- releases handed to verbs other than `verify`, and figures handed to `report`

Spoil = Callable[[Path], object]


def _json(path: Path, text: str | bytes | int) -> Words:
    return ["report", "r", "--out", "page.html", "--evaluation", raw(path, text)]


def figures(text: str | bytes | int) -> Case:
    return Case(make=lambda root: _json(root / "e.json", text), names="e.json")


def _resealed(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda release: small_release.Kit.edit(release, change)


def _arrays(text: str, tail: bytes | int = b"") -> Spoil:
    """A synthetic.safetensors of this header, under good hashes."""

    def spoil(release: Path) -> None:
        path = release / "dataset" / "synthetic.safetensors"
        head = small_models.raw_safetensors(text)
        raw(path, head + tail if isinstance(tail, bytes) else head)
        if isinstance(tail, int):
            os.truncate(path, len(head) + tail)
        small_release.Kit.seal(release)

    return spoil


def _rewritten(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(release: Path) -> None:
        (release / name).write_bytes(change((release / name).read_bytes()))
        small_release.Kit.seal(release)

    return spoil


def _instead(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(release: Path) -> None:
        (release / name).unlink()
        make(release / name)

    return spoil


ARRAYS = "dataset/synthetic.safetensors"
HUGE = '{"images":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]},"labels":{"dtype":"I64","shape":[0],"data_offsets":[%d,%d]}}'
TAMPERED: dict[str, Spoil] = {
    "a flipped byte": lambda release: (release / "README.md").write_bytes(b"x"),
    "no folder": shutil.rmtree,
    "a file more": lambda release: (release / "evil.py").write_text("x"),
    "a file more with an escape code": lambda release: (release / "a\x1b[2J\nPASS").write_text("x"),
    "arrays that are a pipe": _instead(ARRAYS, os.mkfifo),
    "arrays that are a link": _instead(ARRAYS, lambda path: path.symlink_to("/etc/passwd")),
    "arrays that are a folder": _instead(ARRAYS, Path.mkdir),
    "a certificate that is a pipe": _instead("certificate.json", os.mkfifo),
    "a certificate nested 100,000 deep": _rewritten("certificate.json", lambda _: b"[" * 100_000),
    "a certificate with a key twice": _rewritten("certificate.json", lambda old: old.replace(b"{", b'{"format":1,', 1)),
    "a certificate with NaN": _rewritten("certificate.json", lambda old: old.replace(b'"seed": 7', b'"seed": NaN')),
    "a certificate with 1e400": _rewritten("certificate.json", lambda old: old.replace(b'"seed": 7', b'"seed": 1e400')),
    "a certificate with 5,000 digits": _rewritten(
        "certificate.json", lambda old: old.replace(b'"seed": 7', b'"seed": ' + b"7" * 5000)
    ),
    "a certificate in UTF-16": _rewritten("certificate.json", lambda old: old.decode().encode("utf-16")),
    "ε that is smaller": _resealed(lambda c: c["guarantee"].update(epsilon="0.5")),
    "a kind that is no kind": _resealed(lambda c: c["release"].update(kind=["model"])),
    "a kind that it is not": _resealed(lambda c: c["release"].update(kind="diffusion")),
    "markup in the statement": _resealed(lambda c: c.update(statement="<script>alert(1)</script>")),
    "settings that are a key of 8,000 parts": _rewritten("config.toml", lambda _: b"a" + b".a" * 8000 + b" = 1"),
    "arrays of 2^60 elements": _arrays(HUGE % (2**60, 2**62, 2**62, 2**62)),
    "arrays of 2^64 bytes": _arrays(HUGE % (2**64, 2**66, 2**66, 2**66)),
    "arrays of 200 MiB, zeros": _arrays(HUGE % (50 * 2**20, 200 * 2**20, 200 * 2**20, 200 * 2**20), 200 * 2**20),
    "a header of 2^60 bytes": lambda release: (
        raw(release / ARRAYS, struct.pack("<Q", 2**60) + b"{}"),
        small_release.Kit.seal(release),
    ),
    "a header nested 100,000 deep": _arrays("[" * 100_000),
    "a header with a key twice": _arrays('{"images":{},"images":{}}'),
    "files of 2^28 bytes, zeros": lambda release: (
        [os.truncate(release / name, 2**28) for name in (ARRAYS, "dataset/train.parquet")]
    ),
    "a file of 2^40 bytes": lambda release: os.truncate(release / ARRAYS, 2**40),
    "a hundred thousand entries": lambda release: [(release / f"{n}").touch() for n in range(1000)],
}
USES: dict[str, Callable[[Path], Words]] = {
    "report": lambda root: ["report", "r", "--out", "page.html"],
    "sample": lambda root: ["sample", "r", "--out", "made"],
    "teacher": lambda root: ["model", "--teacher", "r", "--out", "made"],
}


def used(verb: str, spoil: Spoil) -> Case:
    """A case of a release, spoiled, and what somebody wants from it. `r` is there already."""

    def make(root: Path) -> Words:
        spoil(root / "r")
        return USES[verb](root)

    return Case(make=make, names="r")


# What evaluate reads of a release are the arrays, so only what is wrong with them is its business.
READ_BY_EVALUATE = tuple(name for name in TAMPERED if "array" in name or "header" in name or name == "no folder")
RELEASES = {
    f"report: {name}": used("report", spoil) for name, spoil in TAMPERED.items()
} | {
    f"{verb}: {name}": used(verb, TAMPERED[name])
    for verb in ("sample", "teacher")
    for name in ("a flipped byte", "a file more", "arrays that are a pipe", "a kind that is no kind", "a file of 2^40 bytes")
} | {
    f"evaluate: {name}": Case(
        make=lambda root, spoil=TAMPERED[name]: (spoil(root / "r"), ["evaluate", "r", "--data", private(root), "--out", "e.json"])[1],
        names="r",
    )
    for name in READ_BY_EVALUATE
}  # fmt: skip
FIGURES = {
    "figures: nested 100,000 deep": figures("[" * 100_000),
    "figures: objects nested 5,000 deep": figures('{"a":' * 5000 + "1" + "}" * 5000),
    "figures: a number of 5,000 digits": figures('{"a":1' + "0" * 5000 + "}"),
    "figures: NaN": figures('{"mean":NaN}'),
    "figures: a key twice": figures('{"a":1,"a":2}'),
    "figures: not UTF-8": figures(b"\xff\xfe"),
    "figures: with a BOM": figures(b"\xef\xbb\xbf{}"),
    "figures: a list": figures("[]"),
    "figures: 2 GiB": figures(2**31),
    "figures: empty": figures(b""),
    "figures: a pipe": Case(
        make=lambda root: ["report", "r", "--out", "p", "--evaluation", hostile_data.special(root / "e.json", "pipe")],
        names="e.json",
    ),
    "figures: missing": Case(make=lambda root: ["report", "r", "--out", "p", "--evaluation", "e.json"], names="e.json"),
    "page: a folder": Case(make=lambda root: ["report", "r", "--out", _folder(root, 0)], names="t"),
    "page: here": Case(make=lambda root: ["report", "r", "--out", "."]),
    "page: the root": Case(make=lambda root: ["report", "r", "--out", "/"]),
    "page: a device": Case(make=lambda root: ["report", "r", "--out", "/dev/full"], names="/dev/full"),
    "page: in no folder": Case(make=lambda root: ["report", "r", "--out", "no/page.html"], names="no/page.html"),
    "page: in the release": Case(make=lambda root: ["report", "r", "--out", "r/page.html"], names="r/page.html"),
    "page: on a full disk": Case(
        make=lambda root: ["report", "r", "--out", "page.html"],
        names="page.html",
        file_bytes=1000,
        leaves=("page.html.partial",),
    ),
    "figures to a folder": Case(
        make=lambda root: ["evaluate", "r", "--data", private(root), "--out", _folder(root, 0)], names="t"
    ),
    "figures to a device": Case(
        make=lambda root: ["evaluate", "r", "--data", private(root), "--out", "/dev/full"], names="/dev/full"
    ),
    "figures into the release": Case(
        make=lambda root: ["evaluate", "r", "--data", private(root), "--out", "r/e.json"], names="r/e.json"
    ),
    "samples of a data set": Case(make=lambda root: ["sample", "r", "--out", "made"], names="r"),
    "samples to a folder that is there": Case(make=lambda root: ["sample", "r", "--out", "r"], names="r"),
}

ALL = DATA | SETTINGS | TARGETS | LEDGERS | TEACHERS | RELEASES | FIGURES
ON_A_RELEASE = frozenset(RELEASES | FIGURES)
