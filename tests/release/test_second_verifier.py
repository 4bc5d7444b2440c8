"""Two verifiers that share nothing say the same of every release; and the form of a release is the one that is published.

q sampling_prob, σ noise_multiplier, T count.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from crash_harness import remembered
from dpdistill import pipeline, planning
from dpdistill.audit import result
from dpdistill.bundle import certificate as certificates
from dpdistill.bundle import ledger_check, write_bundle
from dpdistill.bundle.diffusion_product import DiffusionProduct, shapes
from dpdistill.bundle.onnx_file import student_onnx
from dpdistill.bundle.verification import verify
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.conversion import convert
from dpdistill.diffusion import diffuse
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.shared import linear
from dpdistill.models.wavelet_net import WaveletNet
from dpdistill.privacy import GaussianSum, Ledger, NoisyVotes, ShardSum, accounting
from small_sampler import NETWORK, SAMPLER

ROOT = Path(__file__).parents[2]
Lines = list[dict[str, Any]]
TOOL = ROOT / "tools" / "verify_release.py"
SCHEMA = json.loads((ROOT / "docs" / "bundle.schema.json").read_text())
CERTIFICATE = jsonschema.Draft202012Validator(SCHEMA)
LINE = jsonschema.Draft202012Validator({"$ref": "#/$defs/ledger_line", "$defs": SCHEMA["$defs"]})
MAIN = compile(ast.Module(ast.parse(TOOL.read_text()).body[-1:], []), str(TOOL), "exec")  # what it does as a command
_spec = importlib.util.spec_from_file_location("verify_release", TOOL)
assert _spec is not None
assert _spec.loader is not None
tool: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)
tool.losses = functools.lru_cache(maxsize=8)(tool.losses)  # of a hundred releases with the same charges
tool.epsilon = remembered(tool.epsilon)


def second(folder: Path) -> tuple[int, str]:
    """(exit code, what it prints) of the second verifier. It fails in one line, without a traceback."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [str(TOOL), str(folder)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            exec(MAIN, vars(tool) | {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = argv
    text = said.getvalue()
    assert text.startswith("FAIL  " if code else "PASS  "), text
    assert code == 0 or text.count("\n") == 1, text
    return code, text


def agree(folder: Path) -> bool:
    """Whether a release passes. Both verifiers say so, and their ε is the same to 1e-3."""
    verdict = verify(folder)
    code, text = second(folder)
    assert (code == 0) == verdict.ok, (text, verdict.problems)
    certificate = json.loads((folder / "certificate.json").read_text())
    CERTIFICATE.validate(certificate)
    if verdict.ok:
        assert text.splitlines()[0] == f"PASS  {verdict.guarantee}"
    if certificate["ledger"] is not None and verdict.ok:
        raw = (folder / "ledger.jsonl").read_bytes()
        for line in raw.splitlines():
            LINE.validate(json.loads(line))
        for (section, name), value in tool.recount(raw, certificate["release"], copy.deepcopy(certificate)).items():
            above = float(certificate[section][name]) - value  # ours, rounded up to 1e-3
            assert -1e-4 <= above <= 1.1e-3, (name, value, above)
    return verdict.ok


# --- releases of every kind


DOSSER = {"sampling_prob": 0.5, "group_size": 10, "width": 4} | {
    "sampling_steps": 3,
    "optimisation_steps": 4,
    "subspace_dim": 4,
    "auxiliary_images": 20,
}
JOINT = {
    "steps": 4,
    "networks": 2,
    "pool": 12,
    "feature_dims": 8,
    "pixel_dims": 6,
    "components": 2,
    "width": 4,
}
DPSAD = {
    "warm_start": "mixture",
    "share_denoiser": 0.5,
    "pixel_dims": 6,
    "components": 2,
    "expected_batch": 20,
    "steps": 3,
} | {
    "multiplicity": 2,
    **NETWORK,
    **SAMPLER,
}
SMALL = {"steps": 4, "batch": 16, "width": 8, "generator_width": 4, "latent": 4, "pool": 64}


def student(folder: Path, name: str, settings: dict[str, Any], **more: Any) -> Path:
    facts = {"out": str(folder / name), "per_class": 2, "settings": SMALL | settings}
    return convert(ModelConfig(**facts, **more), quiet=True)


def brought(folder: Path) -> str:
    """A teacher's file, of whose training nothing is known here."""
    model = WaveletNet((1, 8, 8), 3, width=8, groups=4, generator=torch.Generator().manual_seed(0))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    (folder / "t.onnx").write_bytes(student_onnx(weights, model.config))
    return str(folder / "t.onnx")


def attested(folder: Path) -> Path:
    facts = {"attested_epsilon": 2.5004, "attested_delta": 1e-6, "attested_unit": "patient"}
    return student(folder, "attested", {}, teacher=brought(folder), **facts)


def runs(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """(name, release, whether it passes) of real runs on 60 made-up records, those on one ledger one after the other."""
    rng = np.random.default_rng(1)
    labels = np.arange(60) % 3
    images = rng.integers(0, 90, (60, 8, 8)).astype(np.uint8)
    images[labels == 0, :4] += 150
    ids = {"classes": np.array(["top", "left", "none"]), "person": np.arange(60) // 3}
    np.savez(folder / "p.npz", images=images, labels=labels.astype(np.int64), **ids)
    records = {"data": str(folder / "p.npz"), "per_class": 2}
    ledger = {"ledger": str(folder / "book.jsonl")}
    dataset = RunConfig(out=str(folder / "dataset"), method="dosser", settings=DOSSER, **records, **ledger)
    yield "dosser", pipeline.distil(dataset, quiet=True), True
    settings = {"teacher_dims": 20, "teacher_steps": 3}
    first = student(folder, "first", settings, data=records["data"], budget=5.0, **ledger)
    yield "private teacher on the same ledger, cap raised", first, True
    yield "converted again", student(folder, "again", {"width": 4}, teacher=str(first)), True
    joint = RunConfig(out=str(folder / "joint"), method="joint", settings=JOINT, **records)
    yield "joint", pipeline.distil(joint, quiet=True), True
    sampled = DiffusionConfig(
        out=str(folder / "sampled"), epsilon=2.0, budget=3.0, expected_records=60, settings=DPSAD, **records
    )
    yield "diffusion on the same ledger", diffuse(sampled, quiet=True), True
    votes = {"teacher_dims": 20, "queries": 20}
    people = {"ledger": str(folder / "people.jsonl"), "id_column": "person", "shards": 4}
    yield "votes by id", student(folder, "votes", votes, data=records["data"], **people), True
    yield "attested", attested(folder), True
    opaque = student(folder, "opaque", {}, teacher=brought(folder), accept_no_record_guarantee=True)
    yield "opaque", opaque, False


def test_both_say_the_same_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long either takes is not asserted: it would be about the machine."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 100)
    monkeypatch.setattr(dpsad, "GUIDE", linear.Training(teacher_steps=2, teacher_dims=4))
    monkeypatch.setattr(dpsad, "N_GENERATED", 12)
    for name, folder, passes in runs(tmp_path):
        assert agree(folder) == passes, name


def votes(**changes: Any) -> NoisyVotes:
    plain = {"name": "votes", "n_queries": 50, "n_classes": 2, "n_models": 30, "noise_multiplier": 6.0}
    return NoisyVotes(**plain | changes)


def vectors(**changes: Any) -> ShardSum:
    return ShardSum(**{"name": "vectors", "dim": 40, "n_models": 30, "noise_multiplier": 5.0} | changes)


def signal(q: float, sigma: float, name: str = "signal") -> GaussianSum:
    return GaussianSum(name=name, dim=16, n_classes=2, noise_multiplier=sigma, sampling_prob=q)


# unit, cap, what other runs were charged, what this one was: (query, count) each
BOOKS: dict[str, tuple[str, float, list[Any], list[Any]]] = {
    "votes of persons": ("id", 9, [(votes(), 2)], [(votes(), 3)]),
    "votes of owners": ("owner", 30, [], [(votes(noise_multiplier=0.8), 1)]),
    "votes without ids": ("record", 9, [(signal(0.01, 4.0), 300)], [(votes(unit_moves=2), 1)]),
    "vectors and votes": ("record", 9, [], [(vectors(unit_moves=2), 2), (votes(unit_moves=2), 1), (signal(0.02, 4.0), 90)]),
    "vectors of persons": ("id", 9, [], [(vectors(), 4)]),
    "sampled and full": ("record", 9, [(signal(1, 4.0), 2)], [(signal(0.05, 4.0), 200), (signal(1, 20.0), 2)]),
    "three kinds of sampling": ("record", 9, [], [(signal(q, 5.0, f"q{q}"), 9) for q in (0.3, 0.01, 0.002)]),
    "above 20": ("record", 200, [], [(signal(0.5, 1.0), 60)]),
    "closed form": ("record", 900, [(signal(0.01, 0.05), 1)], [(signal(0.5, 3.0), 10)]),
    "closed form together": ("record", 900, [], [(signal(1, 0.5), 40), (signal(0.5, 3.0), 10)]),
    "hardly anything": ("record", 9, [], [(signal(0.001, 50.0), 3)]),
    "nothing": ("record", 9, [(signal(1, 4.0), 2)], []),
}  # fmt: skip


def book(kit: Any, run: str, config: str, name: str) -> bytes:
    """A ledger: a run that never ended, other runs, and this one, of which a release was charged again."""
    unit, cap, others, own = BOOKS[name]
    opening = {
        "type": "open",
        "format": "dpdistill-ledger-1",
        "data": "toy",
        "unit": unit,
        "relation": "add_or_remove_one",
    }
    lines: Lines = [opening | {"cap_epsilon": "0.5", "cap_delta": "1e-06"}]

    def charge(whose: str, query: Any, count: int = 1, again: str = "") -> None:
        lines.append({"type": "intent", "run": whose, "count": count, "query": query.describe(), "again": again})

    for whose in ("run-lost", "run-other"):
        lines.append({"type": "run", "run": whose, "method": "ndpdc", "config": "1" * 64})
    charge("run-lost", votes(noise_multiplier=90.0) if unit != "record" else signal(1, 90.0))
    lines.append({"type": "cap", "cap_epsilon": repr(float(cap)), "cap_delta": "1e-06"})
    lines.append({"type": "run", "run": run, "method": "joint", "config": config})
    for query, count in others:
        charge("run-other", query, count)
    for query, count in own:
        charge(run, query, count)
    if own:
        charge(run, own[0][0], again="4-0")
    lines.append({"type": "final", "run": run})
    raw: bytes = kit.chain(lines)
    return raw


@pytest.mark.parametrize("name", BOOKS)
def test_both_say_the_same_of_any_ledger(name: str, tmp_path: Path, kit: Any) -> None:
    made = kit.synthetic(
        soft=name == "votes of owners", shape=(3, 6, 8), **({"parts": 2, "gain": 8} if "20" in name else {})
    )
    facts = kit.facts(tmp_path / "plain", made)
    raw = book(kit, facts.run, hashlib.sha256(facts.config_toml.encode()).hexdigest(), name)
    checks = {query.name: 1e-7 for query, _ in BOOKS[name][3]}
    facts = kit.facts(tmp_path / "plain", made, ledger_raw=raw, checks=checks, delta=3e-6 if "above" in name else 1e-6)
    assert agree(write_bundle(tmp_path / "out", made, facts))


def diffusion() -> DiffusionProduct:
    config = {"side": 8, "channels": 1, "width": 8}
    arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes(config, 2).items()}
    return DiffusionProduct(transformer=arrays, config=config, class_names=("cat", "dog"))


def test_both_say_the_same_of_a_diffusion_model_and_of_test_noise(tmp_path: Path, kit: Any) -> None:
    made = kit.synthetic()
    assert agree(write_bundle(tmp_path / "diffusion", made, kit.facts(tmp_path / "a", made), diffusion()))
    assert not agree(write_bundle(tmp_path / "test", made, kit.facts(tmp_path / "b", made, run="insecure-1")))
    files = tool.read_folder(tmp_path / "diffusion")
    for order in (sorted(files), sorted(files, reverse=True)):  # a folder lists its files in any order
        found = tool.describe({name: files[name] for name in order})
        assert found["student_parameters"] == sum(array.size for array in diffusion().transformer.values())


# --- the accountant alone


def test_the_golden_table() -> None:
    golden = [
        (1.0, 1.0, 1, 1e-5, 4.377178),
        (1.0, 4.0, 100, 1e-5, 13.206712),
        (0.01, 1.0, 1000, 1e-5, 1.82824),
        (0.01, 4.2969, 10000, 1e-5, 0.87319),
        (0.05, 1.1, 1200, 1e-5, 10.19692),
        (0.1, 3.0, 300, 1e-5, 2.49480),
        (256 / 60000, 1.1, 14062, 1e-5, 2.38169),
        (0.5, 8.0, 200, 1e-5, 3.83789),
        (0.2, 2.0, 500, 1e-6, 13.900855),
        (0.001, 0.6, 20000, 1e-7, 4.451404),
    ]
    for q, sigma, count, delta, epsilon in golden:
        assert tool.epsilon([(q, sigma, count)], delta) == pytest.approx(epsilon, abs=1e-4), (q, sigma, count)


def grid() -> Iterator[tuple[list[accounting.Part], float, bool]]:
    plain = itertools.product((0.0002, 0.001, 0.005, 0.02), (4.0, 8.0, 20.0, 60.0), (1, 40, 600))
    for (q, sigma, count), delta, exchange in itertools.product(plain, (1e-4, 1e-8), (False, True)):
        yield [(q, sigma, count)], delta, exchange
    rng = np.random.default_rng(5)
    for index in range(12):
        q, sigma, count = 10 ** rng.uniform(-3, -1), rng.uniform(3, 9), int(10 ** rng.uniform(0, 2))
        more = (10 ** rng.uniform(-2, -0.5), rng.uniform(4, 9), int(10 ** rng.uniform(0, 2)))
        parts = [(1.0, rng.uniform(3, 30), 2), (q, sigma, count), more, (1.0, rng.uniform(3, 30), 3)]
        yield parts[: 2 + index % 3], 10 ** rng.uniform(-9, -3), bool(index % 2)
    for sigma in (0.02, 0.3, 1.0, 7.0, 300.0, 3000.0):
        yield [(1.0, sigma, 1)], 1e-5, False
        yield [(1.0, sigma, 5)], 1e-7, True
    yield [(0.3, 0.05, 7), (1.0, 3.0, 2)], 1e-5, False
    yield [(0.5, 1.0, 60)], 1e-5, True  # above 20
    yield [], 1e-5, False


def test_the_accountant_agrees_with_ours_on_a_grid() -> None:
    points = list(grid())
    assert len(points) >= 200
    for parts, delta, exchange in points:
        ours = accounting.epsilon(parts, delta, "replace_one" if exchange else "add_or_remove_one")
        other = tool.epsilon(parts, delta, exchange)
        assert other == pytest.approx(ours, abs=1e-3), (parts, delta, exchange)


def test_a_count_that_would_never_end_is_refused_by_both() -> None:
    with pytest.raises(ValueError, match="too much"):
        tool.epsilon([(1e-4, 100.0, 10**12)], 1e-5)
    assert tool.epsilon([(1e-4, 100.0, 10**6)], 1e-5) == pytest.approx(0.024, abs=1e-4)


# --- tampered releases


def chained(change: Callable[[Lines], object]) -> Callable[[Path, Any], None]:
    """Rewrites the ledger with hashes that hold, and what the certificate says of its length, head and hash."""

    def tamper(folder: Path, kit: Any) -> None:
        lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
        change(lines)
        raw = kit.chain(lines)
        (folder / "ledger.jsonl").write_bytes(raw)
        head = json.loads(raw.splitlines()[-1])["hash"] if lines else "0" * 64
        facts = {"lines": len(lines), "head": head, "sha256": hashlib.sha256(raw).hexdigest()}
        kit.edit(folder, lambda certificate: certificate["ledger"].update(facts))

    return tamper


def raw_ledger(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path, Any], None]:
    """Rewrites the ledger's lines as they stand, hashes and all."""

    def tamper(folder: Path, kit: Any) -> None:
        path = folder / "ledger.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
        raw = path.read_bytes()
        facts = {"lines": raw.count(b"\n"), "sha256": hashlib.sha256(raw).hexdigest()}
        kit.edit(folder, lambda certificate: certificate["ledger"].update(facts))

    return tamper


def claim(*path: str | int, value: Any) -> Callable[[Path, Any], None]:
    """Another value at a place in the certificate, under good hashes."""

    def change(certificate: Any) -> None:
        for key in path[:-1]:
            certificate = certificate[key]
        certificate[path[-1]] = value

    return lambda folder, kit: kit.edit(folder, change)


def drop(*path: str) -> Callable[[Path, Any], None]:
    def change(certificate: Any) -> None:
        for key in path[:-1]:
            certificate = certificate[key]
        del certificate[path[-1]]

    return lambda folder, kit: kit.edit(folder, change)


def write(name: str, change: Callable[[bytes], bytes], seal: bool = True) -> Callable[[Path, Any], None]:
    def tamper(folder: Path, kit: Any) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if seal:
            kit.seal(folder)

    return tamper


def reworded(folder: Path, kit: Any) -> None:
    """A smaller ε everywhere: in the field, in the sentence and on the card."""

    def change(certificate: dict[str, Any]) -> None:
        certificate["statement"] = certificate["statement"].replace(certificate["guarantee"]["epsilon"], "0.9")
        certificate["guarantee"]["epsilon"] = "0.9"

    kit.edit(folder, change)
    sentence = json.loads((folder / "certificate.json").read_text())["statement"]
    (folder / "README.md").write_text(sentence)
    kit.seal(folder)


def swapped(folder: Path, kit: Any) -> None:
    """The sentence of a better release, on the card as well."""
    better = "Adding or removing one record changes nothing at all."
    kit.edit(folder, lambda certificate: certificate.update(statement=better))
    (folder / "README.md").write_text(better)
    kit.seal(folder)


def linked(folder: Path, kit: Any) -> None:
    (folder / "config.toml").rename(folder.parent / "config.toml")
    (folder / "config.toml").symlink_to(folder.parent / "config.toml")


def piped(folder: Path, kit: Any) -> None:
    (folder / "config.toml").unlink()
    os.mkfifo(folder / "config.toml")


def mine(lines: Lines) -> Lines:
    return [line for line in lines if line["type"] == "intent" and line["run"].startswith("run-0")]


def nan_pixel(raw: bytes) -> bytes:
    return raw[:-4] + np.float32("nan").tobytes()


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Another header of the tensors' file, in its canonical form."""

    def rewrite(raw: bytes) -> bytes:
        end = 8 + int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8:end])
        change(found)
        text = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + raw[end:]

    return rewrite


def last_bit(raw: bytes) -> bytes:
    """Another value of the first pixel, by so little that no table or picture shows it."""
    first = 8 + int.from_bytes(raw[:8], "little")
    return raw[:first] + bytes([raw[first] ^ 1]) + raw[first + 1 :]


IMAGES = "dataset/synthetic.safetensors"
TAMPERED: dict[str, Callable[[Path, Any], object]] = {
    "a flipped pixel": write(IMAGES, lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], seal=False),
    "a flipped bit of a pixel": write(IMAGES, last_bit),
    "a flipped letter": write("README.md", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], seal=False),
    "a flipped hash": write("SHA256SUMS", lambda raw: b"0" + raw[1:] if raw[:1] != b"0" else b"1" + raw[1:], seal=False),
    "a flipped byte of the ledger": write("ledger.jsonl", lambda raw: raw.replace(b'"count":5', b'"count":4')),
    "the last byte cut": write("dataset/train.parquet", lambda raw: raw[:-1], seal=False),
    "no config": lambda folder, kit: (folder / "config.toml").unlink(),
    "another config": write("config.toml", lambda raw: raw.replace(b"3.0", b"1.0")),
    "one more file": lambda folder, kit: (folder / "key").write_text("x"),
    "one more folder": lambda folder, kit: (folder / "model").mkdir(),
    "a file with a newline": lambda folder, kit: (folder / "a\nPASS").write_text("x"),
    "a link": linked,
    "a linked folder": lambda folder, kit: (
        (folder / "dataset").rename(folder.parent / "d"),
        (folder / "dataset").symlink_to(folder.parent / "d"),
    ),
    "a pipe": piped,
    "a certificate of a gigabyte": lambda folder, kit: os.truncate(folder / "certificate.json", 2**30),
    "lines swapped": raw_ledger(lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]]),
    "a line left out": raw_ledger(lambda lines: [*lines[:4], *lines[5:]]),
    "a line twice": raw_ledger(lambda lines: [*lines[:5], *lines[4:]]),
    "a line with a space": raw_ledger(lambda lines: [*lines[:4], lines[4].replace(b":", b": ", 1), *lines[5:]]),
    "a key twice": raw_ledger(lambda lines: [*lines[:4], lines[4].replace(b'{"again"', b'{"again":"","again"'), *lines[5:]]),
    "an intent removed, chain rebuilt": chained(lambda lines: lines.remove(mine(lines)[0])),
    "an intent of another run": chained(lambda lines: mine(lines)[0].update(run="run-before")),
    "an intent in the name of a run that never was": chained(lambda lines: mine(lines)[0].update(run="run-never")),
    "another run's intent in this one's name": chained(lambda lines: lines[2].update(run="run-0123456789abcdef")),
    "a fresh charge after the end": chained(lambda lines: lines.append(mine(lines)[0])),
    "no end": chained(lambda lines: lines.pop()),
    "fewer releases": chained(lambda lines: lines[2].update(count=4)),
    "more noise": chained(lambda lines: mine(lines)[0]["query"].update(noise_multiplier="30.0")),
    "less sampling": chained(lambda lines: lines[2]["query"].update(sampling_prob="0.01")),
    "noise of NaN": chained(lambda lines: mine(lines)[0]["query"].update(noise_multiplier="nan")),
    "noise in other words": chained(lambda lines: mine(lines)[0]["query"].update(noise_multiplier="3.00")),
    "a cap lowered below what was spent": chained(lambda lines: lines[0].update(cap_epsilon="1.0")),
    "a cap raised in the file": chained(lambda lines: lines[0].update(cap_epsilon="100.0")),
    "a cap raised too late": chained(
        lambda lines: (
            lines[0].update(cap_epsilon="1.0"),
            lines.append({"type": "cap", "cap_epsilon": "3.0", "cap_delta": "1e-05"}),
        )
    ),
    "a cap of infinity": chained(lambda lines: lines[0].update(cap_epsilon="inf")),
    "a unit of one's own": chained(lambda lines: lines[0].update(unit="hospital")),
    "another relation": chained(lambda lines: lines[0].update(relation="replace_one")),
    "an unknown mechanism": chained(lambda lines: mine(lines)[0]["query"].update(mechanism="laplace")),
    "one more field in a query": chained(lambda lines: mine(lines)[0]["query"].update(more="x")),
    "a count of true": chained(lambda lines: mine(lines)[0].update(count=True)),
    "a count of a half": chained(lambda lines: mine(lines)[0].update(count=0.5)),
    "no ledger": write("ledger.jsonl", lambda raw: b""),
    "ε lowered by the least step": claim("guarantee", "epsilon", value="1.286"),
    "ε lowered": claim("guarantee", "epsilon", value="0.5"),
    "ε idly high": claim("guarantee", "epsilon", value="2.9"),
    "ε lowered wherever it stands": reworded,
    "ε under exchange lowered": claim("guarantee", "epsilon_replace_one", value="1.3"),
    "ε of all runs lowered": claim("guarantee", "epsilon_all_runs", value="1.3"),
    "what was spent lowered": claim("ledger", "spent_epsilon", value="0.1"),
    "ε in other words": claim("guarantee", "epsilon", value="1.2870"),
    "ε as a number": claim("guarantee", "epsilon", value=1.287),
    "ε of NaN": claim("guarantee", "epsilon", value="nan"),
    "another δ": claim("guarantee", "delta", value="0.001"),
    "δ of 1": claim("guarantee", "delta", value="1.0"),
    "a sentence of one's own": claim("statement", value="Perfectly private."),
    "a sentence of one's own, on the card too": swapped,
    "attested all of a sudden": claim("guarantee", "basis", value="attested"),
    "a claim that is empty": claim("claim", value={}),
    "an assumption less": lambda folder, kit: kit.edit(folder, lambda certificate: certificate["assumptions"].pop()),
    "a limit reworded": claim("limits", 0, value="None."),
    "a mechanism less": lambda folder, kit: kit.edit(folder, lambda certificate: certificate["mechanisms"].pop()),
    "a mechanism counted twice": claim("mechanisms", 0, "count", value=2),
    "noise further from its ideal": claim("randomness", "distance_to_ideal", value="0.0"),
    "noise from elsewhere": claim("randomness", "source", value="a good generator"),
    "a coarser accountant": claim("accountant", "discretisation", value="0.1"),
    "another head": claim("ledger", "head", value="0" * 64),
    "another cap in the certificate": claim("ledger", "cap_epsilon", value="2.0"),
    "another run": claim("release", "run", value="run-before"),
    "another method": claim("release", "method", value="dosser"),
    "a kind of another": claim("release", "kind", value="model"),
    "a conversion that was not": claim("release", "conversion_sha256", value="0" * 64),
    "a field more": claim("audited", value="passed"),
    "a field more within": claim("guarantee", "audit", value="passed"),
    "a field less": drop("assumptions"),
    "a field less within": drop("ledger", "head"),
    "a check that failed": claim("checks", "class sums", value="0.5"),
    "a check less": drop("checks", "class sums"),
    "a check of nothing": claim("checks", "more", value="0.0"),
    "a package more": claim("software", "malware", value="1.0"),
    "an image more": claim("release", "images", value=5),
    "JSON in another layout": write("certificate.json", lambda raw: json.dumps(json.loads(raw)).encode()),
    "JSON with a key twice": write("certificate.json", lambda raw: raw.replace(b'"pages"', b'"pages": "a",\n  "pages"')),
    "JSON with NaN": write("certificate.json", lambda raw: raw.replace(b'"seed": 7', b'"seed": NaN')),
    "JSON that is deep": write("certificate.json", lambda raw: b"[" * 200_000),
    "JSON that is not": write("certificate.json", lambda raw: b"\xff\xfe\x00"),
    "a pixel of NaN": write(IMAGES, nan_pixel),
    "tensors with a byte more": write(IMAGES, lambda raw: raw + b"\0"),
    "tensors with a header of 2^60": write(IMAGES, lambda raw: (2**60).to_bytes(8, "little") + raw[8:]),
    "tensors of another shape": write(IMAGES, header(lambda found: found["images"].update(shape=[4, 1, 16, 4]))),
    "tensors of another dtype": write(IMAGES, header(lambda found: found["labels"].update(dtype="F64"))),
    "tensors that overlap": write(IMAGES, header(lambda found: found["images"].update(data_offsets=[0, 1024]))),
    "tensors of 2^62": write(IMAGES, header(lambda found: found["images"].update(shape=[2**62, 1, 8, 8]))),
    "tensors with other names": write(
        IMAGES, header(lambda found: found["__metadata__"].update(class_names='["cat", "cow"]'))
    ),
    "a label out of range": write(IMAGES, lambda raw: raw.replace((1).to_bytes(8, "little"), (2**40).to_bytes(8, "little"))),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_release_is_refused_by_both(name: str, bundle: Path, kit: Any) -> None:
    TAMPERED[name](bundle, kit)
    assert not verify(bundle).ok
    assert second(bundle)[0] == 1


def test_what_is_tampered_with_was_good(bundle: Path) -> None:
    assert agree(bundle)
    assert json.loads((bundle / "certificate.json").read_text())["guarantee"]["epsilon"] == "1.287"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty", "missing"):
        assert second(tmp_path / name)[0] == 1


# --- audits


KERNEL = result.Kernel(
    mechanism="gaussian_sum", sampling_prob=1.0, epsilon=1.3, draws=1000, lower=1.234, spread=1.001, tail=0.98, repeats=0.0
)  # fmt: skip
ONE_RUN = result.OneRun(
    canaries=60, included=29, releases=2, steinke=0.21, fdp=0.3, expected_steinke=(0.0, 0.4), expected_fdp=(0.1, 0.6),
    most_steinke=4.0, most_fdp=5.0, score_low=-2.0, score_high=3.0, scores_in=(1, 28), scores_out=(30, 1),
    null_trials=200, null_alarms=9, broken_steinke=2.0, broken_fdp=2.9,
)  # fmt: skip
WORLDS = result.TwoWorlds(seen="noisy sums", runs=500, lower_gdp=0.9, lower=0.4)
MEMBERSHIP = result.Membership(
    who="records", attack="a guess", members=80, others=20, auc=(0.5, 0.4, 0.6), power=(0.01, 0.0, 0.05), power_allowed=0.036
)  # fmt: skip


def an_audit(**changes: Any) -> result.Audit:
    """An audit of the release of these tests, ε = 1.287 at 1e-5, with every part."""
    facts = {"epsilon": 1.287, "delta": 1e-5, "confidence": 0.95, "twin": "digits", "blind": "", "kernel": (KERNEL,)}
    parts = {"one_run": ONE_RUN, "two_worlds": (WORLDS,), "membership": (MEMBERSHIP,)}
    return result.Audit(**facts | parts | changes)


def audited(folder: Path, kit: Any, audit: result.Audit, **changes: Any) -> Path:
    made = kit.synthetic()
    return write_bundle(folder / "out", made, kit.facts(folder, made, audit=audit, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel": (), "two_worlds": (), "membership": ()},
        {"one_run": None, "blind": "models vote"},
        {"one_run": replace(ONE_RUN, steinke=1.287, fdp=1.287, null_alarms=30)},
    ],
)
def test_both_pass_a_release_that_an_audit_does_not_refute(changes: dict[str, Any], tmp_path: Path, kit: Any) -> None:
    assert agree(audited(tmp_path, kit, an_audit(**changes)))


def test_both_pass_an_audit_of_a_claim_with_more_digits_than_an_audit_has(tmp_path: Path, kit: Any) -> None:
    assert agree(audited(tmp_path, kit, an_audit(delta=1.23456e-5, epsilon=1.27), delta=1.23456e-5))


LIES: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "more found by one run than is claimed": (("one_run", "steinke"), "1.288"),
    "more found by the other bound": (("one_run", "fdp"), "1.288"),
    "more found by the kernel": (("kernel", 0, "lower"), "1.301"),
    "an infinite bound": (("kernel", 0, "lower"), "inf"),
    "a bound of NaN": (("one_run", "fdp"), "nan"),
    "a kernel at a noise without end": (("kernel", 0, "epsilon"), "inf"),
    "more found in two worlds": (("two_worlds", 0, "lower"), "1.3"),
    "more found of a Gaussian in two worlds": (("two_worlds", 0, "lower_gdp"), "1.3"),
    "noise that is not what it has to be": (("kernel", 0, "faults"), ["spread"]),
    "alarms at coins that nothing has seen": (("one_run", "null_alarms"), 31),
    "another ε": (("epsilon",), "2.0"),
    "an ε in other words": (("epsilon",), "1.2870"),
    "another δ": (("delta",), "0.001"),
    "no ε": (("epsilon",), None),
    "no bound": (("one_run",), {}),
    "an audit of nothing": ((), {}),
    "a text": ((), "passed"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_an_audit_that_refutes_the_claim_or_is_of_another_is_refused_by_both(
    name: str, tmp_path: Path, kit: Any
) -> None:
    path, value = LIES[name]
    folder = audited(tmp_path, kit, an_audit())
    claim("audit", *path, value=value)(folder, kit)
    verdict = verify(folder)
    assert any("audit" in problem or "of another kind" in problem for problem in verdict.problems), verdict.problems
    code, text = second(folder)
    assert code == 1
    assert "audit" in text or "cannot be read" in text or "could not convert" in text


def test_an_audit_of_what_has_no_ledger_is_refused_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 100)
    folder = attested(tmp_path)
    assert agree(folder)
    said = json.loads((folder / "certificate.json").read_text())["guarantee"]
    audit = an_audit(epsilon=float(said["epsilon"]), delta=float(said["delta"]), kernel=(), one_run=None, two_worlds=())
    claim("audit", value=audit.describe())(folder, kit)
    assert "audit is of another claim" in " ".join(verify(folder).problems)
    assert second(folder) == (1, "FAIL  the audit is of another claim, or refutes this one\n")


# --- the tool itself, and the published form


def test_it_is_short_and_imports_nothing_but_the_standard_library_and_numpy() -> None:
    source = TOOL.read_text()
    assert len(source.splitlines()) <= 300
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"numpy"}


def test_it_runs_where_dpdistill_cannot_be_imported(pristine: Path, bundle: Path) -> None:
    code = (
        "import runpy, sys\n"
        "for name in ('dpdistill', 'dp_accounting', 'scipy', 'torch', 'safetensors', 'pyarrow'): sys.modules[name] = None\n"
        f"sys.argv = ['verify_release.py', *sys.argv[1:]]\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    (bundle / "config.toml").write_text("")
    wanted = {
        pristine: (0, "PASS  Adding or removing one record"),
        bundle: (1, "FAIL  no release is there, or SHA256SUMS does not hold"),
    }
    for folder, (exit_code, begin) in wanted.items():
        done = subprocess.run([sys.executable, "-I", "-c", code, folder], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (exit_code, b"")
        assert done.stdout.decode().startswith(begin)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False)
    assert done.returncode == 2


def test_the_schema_has_our_words() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    words, plain = SCHEMA["$defs"], certificates.ASSUMPTIONS
    attested = {key: plain[key] for key in ("code", "public-inputs")}
    record, unit = ({key: certificates.UNIT_ASSUMPTIONS[key]} for key in ("one-record", "one-unit"))
    shards = plain | {"disjoint": certificates.MODEL_ASSUMPTIONS["disjoint"]}
    wanted = {
        "assumptions_of_records": plain | record,
        "assumptions_of_shards": shards | record,
        "assumptions_of_other_units": shards | unit,
        "assumptions_attested": attested | {"attested": certificates.MODEL_ASSUMPTIONS["attested"]},
    }
    for name, texts in wanted.items():
        assert words[name]["const"] == [{"id": key, "text": text} for key, text in sorted(texts.items())]
    assert words["limits"]["const"] == list(certificates.LIMITS)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(more=1),
        lambda c: c.pop("limits"),
        lambda c: c["guarantee"].update(epsilon=1.287),
        lambda c: c["guarantee"].update(epsilon="1.2870"),
        lambda c: c["guarantee"].update(basis="none"),
        lambda c: c["guarantee"].update(basis="attested"),
        lambda c: c["release"].update(student_parameters=1),
        lambda c: c["mechanisms"][0].update(more="1"),
        lambda c: c["mechanisms"][0].pop("count"),
        lambda c: c["assumptions"].pop(),
        lambda c: c.update(statement="Perfectly private."),
        lambda c: c["randomness"].update(source="a given seed, for tests: anyone can draw the same noise"),
    ],
)
def test_the_schema_refuses_another_form(change: Callable[[dict[str, Any]], object], pristine: Path) -> None:
    certificate = json.loads((pristine / "certificate.json").read_text())
    CERTIFICATE.validate(certificate)
    change(certificate)
    assert not CERTIFICATE.is_valid(certificate)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(says="Confirmed."),
        lambda a: a.update(more="1.0"),
        lambda a: a.pop("membership"),
        lambda a: a.update(epsilon=1.287),
        lambda a: a.update(epsilon="nan"),
        lambda a: a.update(twin="<script>"),
        lambda a: a.update(one_run={}),
        lambda a: a["kernel"][0].update(more="1.0"),
        lambda a: a["kernel"][0].update(draws=-1),
        lambda a: a["kernel"][0].pop("faults"),
        lambda a: a["two_worlds"][0].update(lower=0.4),
        lambda a: a["membership"][0].update(auc=["0.5"] * 101),
    ],
)
def test_the_schema_refuses_another_form_of_an_audit(
    change: Callable[[dict[str, Any]], object], pristine: Path
) -> None:
    certificate = json.loads((pristine / "certificate.json").read_text()) | {"audit": an_audit().describe()}
    CERTIFICATE.validate(certificate)
    change(certificate["audit"])
    assert not CERTIFICATE.is_valid(certificate)


def test_the_schema_refuses_another_line(pristine: Path) -> None:
    lines = [json.loads(line) for line in (pristine / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        LINE.validate(line)
        assert not LINE.is_valid(line | {"more": 1})
        assert not LINE.is_valid({key: value for key, value in line.items() if key != "hash"})
    (charge, *_) = mine(lines)
    assert not LINE.is_valid(charge | {"count": "1"})
    assert not LINE.is_valid(charge | {"query": charge["query"] | {"mechanism": "laplace"}})
    assert math.isclose(float(charge["query"]["noise_multiplier"]), 3.0)


@pytest.mark.parametrize("unit", ["record", "id", "owner"])
@pytest.mark.parametrize("moves", [None, 1, 2])
def test_a_mechanism_is_of_the_ledger_s_unit(unit: str, moves: int | None, tmp_path: Path) -> None:
    """Sums hide records; a record that is exchanged moves two shards, and an id or an owner one. Another pair would understate ε."""
    query: Any = GaussianSum(name="s", dim=3, noise_multiplier=4.0)
    if moves:
        query = NoisyVotes(name="v", n_queries=2, n_classes=2, n_models=4, noise_multiplier=4.0, unit_moves=moves)
    with Ledger.open(tmp_path / "l.jsonl", cap=(9.0, 1e-5), unit=unit) as ledger:
        ledger.start("run-1", "m", "0" * 64)
        ledger.reserve("run-1", query)
        ledger.finish("run-1")
        lines = ledger.lines
    fits = (moves == 1) == (unit != "record")
    assert (not ledger_check._shape(lines)) == fits
    if fits:
        assert len(tool.read_ledger((tmp_path / "l.jsonl").read_bytes())[0]) == 4
    else:
        with pytest.raises(ValueError, match="a charge of another unit"):
            tool.read_ledger((tmp_path / "l.jsonl").read_bytes())
