"""The ways to a student model, whole: what is released, what it promises, what is charged, and what is refused before that."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

import small_models
from dpdistill import conversion, planning, sources
from dpdistill.bundle import claims, load_student, read_bundle, verification, verify, write_report
from dpdistill.bundle.claims import Attested, Nominal
from dpdistill.bundle.onnx_file import student_onnx
from dpdistill.config import ModelConfig
from dpdistill.conversion import convert
from dpdistill.data import load_images, to_unit
from dpdistill.errors import ConfigError, DpdistillError, InputError, LedgerError, ReleaseError
from dpdistill.methods.model import votes
from dpdistill.models.teachers import Teacher, from_callable, load_teacher
from dpdistill.models.wavelet_net import WaveletNet
from dpdistill.privacy import gaussian_multiplier
from dpdistill.privacy import ledger as ledgers
from dpdistill.sampling import load_sampler

SMALL = {"steps": 6, "batch": 16, "width": 8, "generator_width": 4, "latent": 4, "pool": 128, "checkpoint_steps": 2}
WAY = {
    "teacher": SMALL | {"teacher_dims": 20, "teacher_steps": 3},
    "votes": SMALL | {"teacher_dims": 20, "queries": 40},
    "conversion": SMALL,
    "opaque": SMALL,
}

OF_A_TEACHER = ["count", "teacher-gradient", "prior-moments", "prior-local-1", "prior-local-2", "prior-tones"]


def save(path: Path, n: int = 60) -> Path:
    """n images [8, 8] of three classes that differ in where they are light, of people with three images each."""
    rng = np.random.default_rng(1)
    labels = np.arange(n) % 3
    images = rng.integers(0, 90, (n, 8, 8)).astype(np.uint8)
    images[labels == 0, :4] += 150
    images[labels == 1, :, :4] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    names = np.array(["top", "left", "none"])
    np.savez(path, images=images, labels=labels.astype(np.int64), classes=names, person=np.arange(n) // 3)
    return path


def onnx_teacher(path: Path, seed: int = 0) -> Path:
    model = WaveletNet((1, 8, 8), 3, width=8, groups=4, generator=torch.Generator().manual_seed(seed))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(student_onnx(weights, model.config))
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelConfig]:
    """run(**changes) -> the configuration of a run of a second or two."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 200)
    save(tmp_path / "data" / "private.npz")

    def make(**changes: Any) -> ModelConfig:
        if not {"teacher", "teachers", "data"} & set(changes):
            changes["data"] = str(tmp_path / "data" / "private.npz")
        plain = {"out": str(tmp_path / "out"), "per_class": 2, **changes}
        way = ModelConfig(**plain).way
        return ModelConfig(**{**plain, "settings": WAY[way] | changes.get("settings", {})})

    return make


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The architecture of a network whose weights are in t.safetensors."""
    code = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    (tmp_path / "theirs.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    save_file({"1.weight": weight, "1.bias": torch.zeros(3)}, tmp_path / "t.safetensors")
    return "theirs:make"


def certificate(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "certificate.json").read_text())
    return found


def the_ledger(tmp_path: Path) -> list[ledgers.Line]:
    (path,) = (tmp_path / "home" / "ledgers").iterdir()
    return ledgers.parse(path.read_bytes())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 10}, "groups do not divide"),
        ({"depth": 17}, "depth is not"),
        ({"width": 4000, "groups": 4}, "student.safetensors .* in one file"),
        ({"width": 1080, "groups": 4}, "all files together"),  # 240 MiB, but there twice
        ({"latent": 10**7}, r"generator.safetensors .*generator_width=, --set latent="),
        ({"lr": 1e30}, "lr from"),
        ({"matrix_lr": 1e30}, "matrix_lr from"),
        ({"clip_norm": 1e-300}, "clip_norm from"),
        ({"reach": 1e300, "reach_max": 1e300}, "reach from"),
        ({"reach_max": 1e300}, "reach_max from"),
    ],
)
def test_a_student_that_cannot_be_is_refused_before_anything_is_charged(
    settings: dict[str, float], words: str, tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(run(settings=settings), quiet=True)
    assert not list((tmp_path / "home").rglob("*.jsonl"))


@pytest.mark.parametrize(
    "more", [{}, {"shards": 5}, {"shards": 5, "id_column": "person"}], ids=["teacher", "votes", "by id"]
)
def test_from_records_to_a_student(more: dict[str, Any], tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    config = run(**more)
    out = convert(config, quiet=True)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert verdict.guarantee is not None
    assert verdict.guarantee.basis == "proved"
    assert 0.998 < verdict.guarantee.epsilon <= 1.001
    assert verdict.guarantee.unit == ("id" if "id_column" in more else "record")
    told = "images drawn from a mixture" in (out / "README.md").read_text()
    assert told == ("images drawn from a mixture" in (out / "report.html").read_text()) == (not more)
    # An id is exchanged at the cost of adding it: one shard changes. A record without an id is not.
    same = verdict.guarantee.epsilon_replace_one == pytest.approx(verdict.guarantee.epsilon)
    assert same == ("id_column" in more)
    found = certificate(out)
    assumed = {each["id"] for each in found["assumptions"]} & {"one-record", "one-unit"}
    assert assumed == {"one-unit" if "id_column" in more else "one-record"}
    assert found["release"]["kind"] == "model"
    assert found["release"]["method"] == ("votes" if more else "teacher")
    assert sorted(os.listdir(tmp_path)) == ["data", "home", "out"]
    charged = [line["query"]["name"] for line in the_ledger(tmp_path) if line["type"] == "intent"]
    assert charged == (["votes"] if more else OF_A_TEACHER)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert convert(config, quiet=True) == out
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_the_student_is_the_same_in_torch_and_onnx(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    out = convert(run(), quiet=True)
    student = load_student(out)
    x = torch.rand(7, 1, 8, 8) * 2 - 1
    session = onnxruntime.InferenceSession(str(out / "model" / "student.onnx"))
    (logits,) = session.run(None, {"images": x.numpy()})
    np.testing.assert_allclose(logits, student(x).detach().numpy(), atol=1e-4)
    assert load_sampler(out).class_names == ("top", "left", "none")
    page = (out / "report.html").read_text()
    assert "The student" in page
    assert "What its generator draws" in page
    write_report(out, tmp_path / "page.html", {"mean": 0.5})
    assert "50.0 %" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "more", [{}, {"shards": 5}, {"accept_no_record_guarantee": True}, {"attested_epsilon": 2.0, "attested_delta": 1e-6}]
)
def test_the_page_shows_teacher_and_student_side_by_side_where_that_is_free(
    more: dict[str, Any], tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    brought = {} if "shards" in more or not more else {"teacher": str(onnx_teacher(tmp_path / "t.onnx"))}
    config = run(**brought, **more)
    out = convert(config, quiet=True)
    page, found = (out / "report.html").read_text(), certificate(out)
    if config.accept_no_record_guarantee:  # an opaque teacher's answers cost what nobody has counted
        assert "side by side" not in page
        assert found["figures"] == {}
        return
    assert verify(out).ok
    assert "Teacher and student side by side" in page
    assert ("fitted to the noisy votes" in page) == (config.way == "votes")
    assert "teacher class 0" not in page
    rows = re.findall(
        r'<td><img src="data:image/png;base64,[^"]+" alt="Made-up image of class \w+"[^>]*></td>(.*)</tr>', page
    )
    assert len(rows) == 3
    student, drawn, names = load_student(out), read_bundle(out), found["release"]["class_names"]
    for k, row in enumerate(rows):
        teacher, pupil = re.findall(r"<td>(\w+), ([0-9.]+) %</td>", row)
        p = student(drawn.images[k * 2 : k * 2 + 1]).softmax(dim=1)[0].detach()
        assert pupil == (names[int(p.argmax())], f"{100 * float(p.max()):.1f}")
        assert teacher[0] == names[int(float(found["figures"][f"teacher_class_{k}"]))]
        assert float(teacher[1]) == pytest.approx(100 * float(found["figures"][f"teacher_probability_{k}"]), abs=0.06)
    if config.teacher:
        teacher_of = load_teacher(str(config.teacher)).outputs(drawn.images[::2]).argmax(dim=1)
        assert [float(found["figures"][f"teacher_class_{k}"]) for k in range(3)] == teacher_of.tolist()


def test_a_changed_student_is_caught(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    out = convert(run(), quiet=True)
    for name in ("model/student.safetensors", "model/student.onnx", "model/config.json", "model/generator.safetensors"):
        raw = (out / name).read_bytes()
        (out / name).write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
        assert not verify(out).ok, name
        (out / name).unlink()
        assert any("missing" in problem for problem in verify(out).problems)
        (out / name).write_bytes(raw)
    assert verify(out).ok


def test_another_architecture_is_refused_by_name(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    from dpdistill.bundle.reading import checksums

    out = convert(run(), quiet=True)
    path = out / "model" / "config.json"
    path.write_text(path.read_text().replace('"wavelet-net"', '"convnet"'))
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (out / "SHA256SUMS").write_bytes(checksums(files))
    assert any("not a wavelet-net" in problem for problem in verify(out).problems)


def test_an_onnx_file_of_other_weights_is_caught_though_all_hashes_hold(
    tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    from dpdistill.bundle.reading import checksums

    out = convert(run(), quiet=True)
    student = load_student(out)
    weights = {name: value.numpy() * 1.5 for name, value in student.state_dict().items()}
    (out / "model" / "student.onnx").write_bytes(student_onnx(weights, student.config))
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (out / "SHA256SUMS").write_bytes(checksums(files))
    assert any("student.onnx" in problem for problem in verify(out).problems)


def test_models_of_owners_vote(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    for owner in range(4):
        onnx_teacher(tmp_path / "models" / f"{owner}.onnx", owner)
    out = convert(run(teachers=str(tmp_path / "models")), quiet=True)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert verdict.guarantee is not None
    assert verdict.guarantee.unit == "owner"
    page = (out / "report.html").read_text()
    assert "made from the votes of owners&#39; models" in page
    assert "Whether an owner was in" in page
    assert certificate(out)["mechanisms"][0]["models"] == "4"


def test_no_owner_is_left_out_in_silence(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    folder = tmp_path / "models"
    for owner, name in enumerate(("0.onnx", "1.ONNX")):
        onnx_teacher(folder / name, owner)
    for name in (".hidden.pt", "README.md", "notes.TXT", "owners.json"):
        (folder / name).write_bytes(b"x")
    config = run(teachers=str(folder))
    assert sources.owners(config).models == 2
    for name, words in (("3.zip", "is not a model file"), ("2.pt", "is a .pt file, which may run code")):
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(InputError, match=rf"{name}: {words}.*torch\.onnx\.export"):
            sources.owners(config)
    (folder / "1").mkdir()
    with pytest.raises(InputError, match=r"1: is a folder, not a model file"):
        sources.owners(config)


def test_an_architecture_is_of_the_owners_files_that_need_one(
    tmp_path: Path, run: Callable[..., ModelConfig], theirs: str
) -> None:
    folder = tmp_path / "models"
    onnx_teacher(folder / "0.onnx")
    onnx_teacher(folder / "1.onnx", 1)
    config = run(teachers=str(folder), architecture=theirs)
    with pytest.raises(InputError, match=r"0\.onnx: needs no architecture.*leave --architecture out"):
        sources.owners(config)
    shutil.copy(tmp_path / "t.safetensors", folder / "2.safetensors")
    assert sources.owners(config).models == 3
    with pytest.raises(InputError, match=r"2\.safetensors: holds weights without their network"):
        sources.owners(run(teachers=str(folder)))


def test_two_owners_of_one_model_are_refused(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    """It would have two votes."""
    for owner in range(3):
        onnx_teacher(tmp_path / "models" / f"{owner}.onnx", owner % 2)
    with pytest.raises(InputError, match=r"2\.onnx: is the same model as 0\.onnx \(keep one of every owner\)"):
        convert(run(teachers=str(tmp_path / "models")), quiet=True)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("option", ["teachers", "teacher"])
def test_a_place_in_the_folder_of_the_models_is_refused(
    option: str, tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    onnx_teacher(tmp_path / "models" / "0.onnx")
    with pytest.raises(ConfigError, match=f"lies in --{option} .*choose a --out outside"):
        convert(run(**{option: str(tmp_path / "models"), "out": str(tmp_path / "models" / "x")}), quiet=True)
    assert sorted(os.listdir(tmp_path)) == ["data", "models"]


def test_pixels_of_another_range_are_found_before_anything_is_spent(
    tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    """A model of pixels 0..255 that is fed 0..1 sees black: one class wins everywhere. A few such owners are let be, as they may be so."""
    (tmp_path / "models").mkdir()
    for owner in range(4):
        w, b = small_models.weight("w", 192, 4, seed=owner), small_models.weight("b", 4, seed=9)
        dark = numpy_helper.from_array(numpy_helper.to_array(w) / 255, "w")
        (tmp_path / "models" / f"{owner}.onnx").write_bytes(small_models.made(weights=[dark, b]).SerializeToString())
    one = {"teacher": str(tmp_path / "models" / "0.onnx"), "accept_no_record_guarantee": True}
    for given in (one, {"teachers": str(tmp_path / "models")}):
        with pytest.raises(InputError, match=r"one class to every made-up image .*--input-low and --input-high"):
            convert(run(**given), quiet=True)
    assert not (tmp_path / "home").exists()
    assert conversion.prepare(run(**one, input_high=255.0)).brought.image_shape == (3, 8, 8)
    assert sources.owners(run(teachers=str(tmp_path / "models"), input_high=255.0)).models == 4
    for owner in range(2):
        bright = small_models.made(weights=[small_models.weight("w", 192, 4, seed=owner), small_models.weight("b", 4)])
        (tmp_path / "models" / f"{owner}.onnx").write_bytes(bright.SerializeToString())
    assert sources.owners(run(teachers=str(tmp_path / "models"))).models == 4


def test_a_teacher_with_our_certificate_hands_its_guarantee_on(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    first = convert(run(out=str(tmp_path / "first")), quiet=True)
    spent = len(the_ledger(tmp_path))
    out = convert(run(teacher=str(first), settings={"width": 4}), quiet=True)
    for page in (
        "README.md",
        "report.html",
    ):  # the first student was shown images of its teacher's mixture; the second one was not
        assert "images drawn from a mixture" in (first / page).read_text()
        assert "images drawn from a mixture" not in (out / page).read_text()
    one, other = verify(first), verify(out)
    assert other.ok, other.problems
    assert one.guarantee == other.guarantee
    assert len(the_ledger(tmp_path)) == spent  # nothing was charged
    assert (out / "ledger.jsonl").read_bytes() == (first / "ledger.jsonl").read_bytes()
    assert load_student(out).config["width"] == 4
    assert convert(run(teacher=str(first), settings={"width": 4}), quiet=True) == out
    # The promise rests on the public images of both: the student's are named beside the teacher's.
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "others.npz", images=pixels, labels=np.arange(40) % 2)
    more = run(teacher=str(first), auxiliary=str(tmp_path / "others.npz"), out=str(tmp_path / "more"))
    others = "procedural; of the conversion: others.npz, public by the user's word"
    assert (certificate(convert(more, quiet=True))["auxiliary"], certificate(out)["auxiliary"]) == (
        others,
        "procedural",
    )
    assert verify(tmp_path / "more").ok
    (first / "model" / "student.onnx").write_bytes(b"x")
    with pytest.raises(DpdistillError):
        convert(run(teacher=str(first), out=str(tmp_path / "third")), quiet=True)


def test_an_attested_guarantee_is_repeated_as_attested(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    teacher = str(onnx_teacher(tmp_path / "t.onnx"))
    out = convert(run(teacher=teacher, attested_epsilon=2.5, attested_delta=1e-6, attested_unit="patient"), quiet=True)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert "Whether a patient was in" in (out / "report.html").read_text()
    assert verdict.guarantee is not None
    assert verdict.guarantee.basis == "attested"
    assert str(verdict.guarantee).startswith("Not proved here, attested")
    assert (verdict.guarantee.epsilon, verdict.guarantee.delta, verdict.guarantee.unit) == (2.5, 1e-6, "patient")
    assert not (out / "ledger.jsonl").exists()
    assert not (tmp_path / "home").exists()


def test_a_teacher_that_is_asked_otherwise_is_another_run(
    tmp_path: Path, run: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for place in ("0", "1"):
        (tmp_path / place).mkdir()
        images, names = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8), np.array(["a", "b"])
        np.savez(tmp_path / place / "open.npz", images=images, labels=np.arange(60) % 2, classes=names)
    plain: dict[str, Any] = {
        "teacher": str(onnx_teacher(tmp_path / "t.onnx")),
        "attested_epsilon": 2.5,
        "attested_delta": 1e-6,
    }
    plain["auxiliary"] = str(tmp_path / "0" / "open.npz")
    others = [run(**plain | change) for change in ({"input_high": 255.0}, {"attested_epsilon": 1.5}, {"mean": "0.5"})]
    others.append(run(**plain | {"auxiliary": str(tmp_path / "1" / "open.npz")}))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(run(**plain), quiet=True)
    for other in others:
        with pytest.raises(ConfigError, match="other settings"):
            convert(other, quiet=True)
    out = convert(run(**plain), quiet=True)
    assert convert(run(**plain), quiet=True) == out
    for other in others:
        with pytest.raises(ReleaseError, match="holds something else"):
            convert(other, quiet=True)


def test_the_release_of_other_owners_is_no_answer(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    """Also on a ledger that all of it is charged to."""
    ledger, budget = str(tmp_path / "l.jsonl"), 99.0
    for seed in range(8):
        onnx_teacher(tmp_path / ("some" if seed < 4 else "others") / f"{seed}.onnx", seed)
    some, others = (run(teachers=str(tmp_path / name), ledger=ledger, budget=budget) for name in ("some", "others"))
    out = convert(some, quiet=True)
    with pytest.raises(ReleaseError, match="other data's release"):
        convert(others, quiet=True)
    assert convert(some, quiet=True) == out


@pytest.mark.parametrize("noise", [True, False])
def test_an_opaque_teacher_gives_no_record_level_guarantee(
    noise: bool, tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    teacher = str(onnx_teacher(tmp_path / "t.onnx"))
    config = run(teacher=teacher, accept_no_record_guarantee=True, settings={"noise": noise})
    out = convert(config, quiet=True)
    verdict = verify(out)
    assert not verdict.ok
    assert verdict.guarantee is None
    found = certificate(out)
    assert found["guarantee"]["basis"] == "none"
    assert found["guarantee"]["epsilon"] is None
    assert found["claim"]["nominal_epsilon"] == ("1" if noise else "inf")
    assert "NO differential-privacy guarantee" in found["statement"]
    page = (out / "report.html").read_text()
    assert "NO RECORD-LEVEL GUARANTEE" in page
    assert "<title>NOT PRIVATE · a student model</title>" in page
    assert "# NO RECORD-LEVEL GUARANTEE" in (out / "README.md").read_text()
    assert not (tmp_path / "home").exists()  # nothing is charged, because nothing is promised


def sealed(out: Path, found: dict[str, Any]) -> None:
    """Writes another certificate, and the check sums that fit it."""
    from dpdistill.bundle.certificate import write
    from dpdistill.bundle.reading import checksums

    (out / "certificate.json").write_bytes(write(found))
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (out / "SHA256SUMS").write_bytes(checksums(files))


@pytest.mark.parametrize(
    ("change", "path", "problem"),
    [
        ("proved", ("guarantee", "basis"), "delta is not a number of ours"),
        ("attested", ("guarantee", "basis"), "delta is not a number of ours"),
        ("1", ("guarantee", "epsilon"), "guarantee.epsilon is not what the ledger and the files give"),
    ],
)
def test_an_opaque_release_cannot_be_dressed_up(
    change: str, path: tuple[str, str], problem: str, tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    teacher = str(onnx_teacher(tmp_path / "t.onnx"))
    out = convert(run(teacher=teacher, accept_no_record_guarantee=True), quiet=True)
    before = verify(out).problems
    found = certificate(out)
    found[path[0]][path[1]] = change
    sealed(out, found)
    verdict = verify(out)
    assert not verdict.ok
    assert verdict.guarantee is None
    assert not any(problem in line for line in before)
    assert any(problem in line for line in verdict.problems), verdict.problems


def test_an_opaque_release_written_as_attested_is_refused(
    tmp_path: Path, run: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything fits an attested ε of 1, pages and all; but its method can attest nothing."""
    teacher = str(onnx_teacher(tmp_path / "t.onnx"))
    claim = Attested(epsilon=1.0, delta=1e-5, unit="record", teacher="t")
    write = conversion.write_result
    monkeypatch.setattr(
        conversion, "write_result", lambda out, made, facts: write(out, made, dataclasses.replace(facts, claim=claim))
    )
    unread = mock.patch.object(verification, "_check_config", return_value=[])  # config.toml says "nominal" as well
    with mock.patch.object(claims, "belongs", return_value=True), unread:  # our own writer would refuse it, too
        out = convert(run(teacher=teacher, accept_no_record_guarantee=True), quiet=True)
        assert verify(out).ok
    assert verify(out).problems == ("certificate.json: a claim that its method cannot make",)
    tool = Path(__file__).parents[1] / "tools" / "verify_release.py"
    second = subprocess.run([sys.executable, tool, out], capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout[:4]) == (1, "FAIL")


def test_the_nominal_count_and_its_worst_case() -> None:
    """The paper's count, one answer, and a record that turns every row: sensitivities 2·sqrt(T), 2·B and 2·B·sqrt(T·B) over σ."""
    sigma = 2 * math.sqrt(100) * gaussian_multiplier(1.0, 1e-5)
    claim = Nominal(steps=100, batch=256, sigma=sigma, delta=1e-5, teacher="t")
    assert claim.epsilon_nominal == pytest.approx(1.0, abs=1e-3)
    assert claim.epsilon_query > 20
    mu = 2 * math.sqrt(100 * 256) * 256 / sigma
    assert claim.epsilon_worst == pytest.approx(mu * mu / 2 + mu * math.sqrt(2 * math.log(1e5)))
    small = Nominal(steps=1, batch=1, sigma=sigma, delta=1e-5, teacher="t")
    # One answer is all there is.
    assert small.epsilon_worst == pytest.approx(small.epsilon_query) == pytest.approx(small.epsilon_nominal)
    assert Nominal(steps=1, batch=1, sigma=0.0, delta=1e-5, teacher="t").epsilon_query == math.inf


WRONG = {
    "nothing given": ({"data": ""}, ConfigError, "give one of --data"),
    "two given": ({"data": "x", "teacher": "y"}, ConfigError, "give one of --data"),
    "shards of no data": ({"teacher": "y", "shards": 3}, ConfigError, "--shards and --id-column cut --data"),
    "ids without shards": ({"id_column": "person"}, ConfigError, "--id-column needs --shards"),
    "half an attestation": ({"teacher": "t", "attested_epsilon": 1.0}, ConfigError, "go together"),
    "a δ that nothing adds up at": (
        {"teacher": "t", "attested_epsilon": 1.0, "attested_delta": 1e-12},
        ConfigError,
        "attested delta in [1e-10, 1)",
    ),
    "an attested ε of 0": (
        {"teacher": "t", "attested_epsilon": 0.0, "attested_delta": 1e-5},
        ConfigError,
        "attested epsilon > 0",
    ),
    "a word and its opposite": (
        {"teacher": "t", "attested_epsilon": 1.0, "attested_delta": 1e-5, "accept_no_record_guarantee": True},
        ConfigError,
        "not both",
    ),
    "another way": ({"method": "votes"}, ConfigError, "leave --method out"),
    "an unknown unit": ({"teacher": "t", "attested_unit": "a b"}, ConfigError, "one word"),
    "a low that is high": ({"teacher": "t", "input_low": 2.0}, ConfigError, "input_low below input_high"),
    "auto of nothing": ({"shards": "auto"}, ConfigError, "plans from --expected-records"),
    "one shard": ({"shards": 1}, ConfigError, "shards in 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, kind, text = WRONG[case]
    with pytest.raises(kind) as error:
        ModelConfig(**{"data": "" if {"teacher", "teachers"} & set(changes) else "private.npz", **changes})
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_teacher_is_refused_before_anything_is_made(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    teacher = onnx_teacher(tmp_path / "t.onnx")
    with pytest.raises(ConfigError, match="nothing is known of how this teacher was trained"):
        convert(run(teacher=str(teacher)), quiet=True)
    (tmp_path / "t.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="ONNX"):
        convert(run(teacher=str(tmp_path / "t.pt"), accept_no_record_guarantee=True), quiet=True)
    with pytest.raises(InputError):
        convert(run(teacher=str(teacher), accept_no_record_guarantee=True, shape="1,16,16"), quiet=True)
    with pytest.raises(InputError):
        convert(run(teacher=str(teacher), accept_no_record_guarantee=True, classes=7), quiet=True)
    with pytest.raises(InputError, match="person_id"):
        convert(run(shards=4, id_column="person_id"), quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds 0 models"):
        convert(run(teachers=str(tmp_path / "empty")), quiet=True)
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.jsonl"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.state").exists()


class Deaf(torch.autograd.Function):
    """Answers like a network, and raises if a gradient is asked of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] * 3

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a gradient flowed into the teacher")


def test_a_teacher_beside_data_is_refused(run: Callable[..., ModelConfig], tmp_path: Path) -> None:
    """It would have been left out in silence, and the data charged."""
    teacher = from_callable(lambda x: x.flatten(1)[:, :3], image_shape=(1, 8, 8), n_classes=3)
    with pytest.raises(ConfigError, match="beside data"):
        convert(run(), teacher, quiet=True)
    assert not (tmp_path / "home").exists()


def test_owners_vote_by_python_callables(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    """As files do: one of each owner, by a name of its own; stopped or finished, the same call finds the same release and account."""

    def owner(number: int, name: str | None = "", shape: tuple[int, int, int] = (1, 8, 8)) -> Teacher:
        weight = torch.randn(64 * shape[0], 3, generator=torch.Generator().manual_seed(number))
        found = f"clinic {number}" if name == "" else name
        return from_callable(lambda x: x.flatten(1) @ weight, image_shape=shape, n_classes=3, name=found)

    config, four = run(teachers="clinics"), [owner(k) for k in range(4)]
    for models, error, words in (
        ([*four[:3], owner(7, None)], ConfigError, "known by its name"),
        ([*four[:3], owner(7, "clinic 0")], InputError, "clinic 0: is the same model as clinic 0"),
        ([*four[:3], owner(7, shape=(3, 8, 8))], InputError, r"clinic 7: takes images \(3, 8, 8\).*one task"),
        (four[:1], InputError, "voting needs one of every owner"),
        ([], InputError, "voting needs one of every owner"),
    ):
        with pytest.raises(error, match=words):
            convert(config, models, quiet=True)
    for bare in (torch.nn.Flatten(), [lambda x: x, four[0]]):  # as it is, not as a teacher
        with pytest.raises(ConfigError, match="from_callable"):
            convert(config, bare, quiet=True)  # type: ignore[arg-type]
    for other in (run(), run(teacher="mine", accept_no_record_guarantee=True)):
        with pytest.raises(ConfigError, match="models that vote are given beside"):
            convert(other, four, quiet=True)
    with pytest.raises(ConfigError, match="a teacher is given beside"):
        convert(config, four[0], quiet=True)
    assert not (tmp_path / "home").exists()
    out = convert(config, four, quiet=True)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert verdict.guarantee is not None
    assert verdict.guarantee.unit == "owner"
    assert certificate(out)["mechanisms"][0]["models"] == "4"
    assert convert(config, reversed(four), quiet=True) == out  # the same owners in another order
    with pytest.raises(ReleaseError, match="holds something else"):
        convert(config, [*four[:3], owner(3, "clinic X")], quiet=True)
    assert len(list((tmp_path / "home").rglob("*.jsonl"))) == 1


def test_the_same_command_twice_at_once_is_refused(
    tmp_path: Path, run: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in one state folder took each other's checkpoints, and the first to end removed it under the second. The first goes on."""
    teacher = from_callable(lambda x: x.flatten(1)[:, :3] * 3, image_shape=(1, 8, 8), n_classes=3, name="mine")
    config, write = run(teacher="mine", accept_no_record_guarantee=True), conversion.write_result

    def meanwhile(*given: Any) -> None:
        with pytest.raises(ConfigError, match="at work here already"):
            convert(config, teacher, quiet=True)
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_result", meanwhile)
        out = convert(config, teacher, quiet=True)
    assert not (tmp_path / "out.state").exists()
    assert convert(config, teacher, quiet=True) == out


def test_votes_converted_once_more(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    """The page speaks of the teacher that there was: the first student, and the card of its own settings and seed."""
    first = convert(run(shards=5, out=str(tmp_path / "first"), seed=4), quiet=True)
    out = convert(run(teacher=str(first), seed=9), quiet=True)
    assert verify(out).ok
    assert "fitted to the noisy votes" in (first / "report.html").read_text()
    assert "fitted to the noisy votes" not in (out / "report.html").read_text()
    assert "public seed 4. The settings are in" in (first / "README.md").read_text()
    card = " ".join((out / "README.md").read_text().split())
    assert (
        "public seed 4 of its teacher, which was converted once more: the settings of that, and its seed, are in `conversion.toml`"
        in card
    )


def test_a_callable_teacher_is_asked_and_never_differentiated(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    teacher = from_callable(Deaf.apply, image_shape=(1, 8, 8), n_classes=3)
    opaque = run(teacher="mine", accept_no_record_guarantee=True, out=str(tmp_path / "opaque"))
    assert certificate(convert(opaque, teacher, quiet=True))["claim"]["teacher"].startswith("callable-")
    assert convert(opaque, teacher, quiet=True) == tmp_path / "opaque"
    other = from_callable(lambda x: -Deaf.apply(x), image_shape=(1, 8, 8), n_classes=3)
    with pytest.raises(DpdistillError, match="holds something else"):  # not the other teacher's release
        convert(opaque, other, quiet=True)
    attested = run(teacher="mine", attested_epsilon=1.0, attested_delta=1e-5)
    assert verify(convert(attested, teacher, quiet=True)).ok


@pytest.mark.parametrize("by", ["owners", "shards"])
def test_no_gradient_reaches_a_model_that_votes(
    by: str, tmp_path: Path, run: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the student's nor the generator's, though its answers could carry one: in two rounds, the second with the generator."""
    weight, asked = torch.ones((), requires_grad=True), list[int]()

    def answers(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Deaf.apply(x * weight)
        asked.append(len(x))
        return found

    with pytest.raises(AssertionError, match="flowed"):
        answers(torch.ones(1, 1, 8, 8)).sum().backward()
    if by == "owners":
        for owner in range(4):
            onnx_teacher(tmp_path / "models" / f"{owner}.onnx", owner)
        read = sources.read_teacher
        deaf = lambda *args: dataclasses.replace(read(*args), outputs=answers)  # noqa: E731
        monkeypatch.setattr(sources, "read_teacher", deaf)
        config = run(teachers=str(tmp_path / "models"), settings={"rounds": 2})
    else:
        monkeypatch.setattr(votes.ShardTrainer, "__call__", lambda self, images, labels, generator: answers)
        config = run(shards=5, settings={"rounds": 2})
    assert verify(convert(config, quiet=True)).ok
    assert len(asked) > 8
    assert weight.grad is None


def test_a_callable_that_does_not_answer_to_the_last_bit_goes_on(
    tmp_path: Path, run: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a served one, or one on a GPU. Without a name it goes by what wins; with one, by that."""
    noise, bias = torch.Generator().manual_seed(0), torch.arange(3)
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))

    def wavering(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight + bias + 1e-5 * torch.rand(len(x), 3, generator=noise)

    def at_ties(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] + 1e-5 * torch.rand(len(x), 3, generator=noise)

    shape: dict[str, Any] = {"image_shape": (1, 8, 8), "n_classes": 3}
    for number, (fn, names) in enumerate(((wavering, {}), (at_ties, {"name": "ours, of May"}))):
        config = run(teacher="mine", accept_no_record_guarantee=True, out=str(tmp_path / str(number)))
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "write_result", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                convert(config, from_callable(fn, **shape, **names), quiet=True)
        with pytest.raises(ConfigError, match="other settings"):
            convert(config, from_callable(lambda x: -x.flatten(1) @ weight, **shape), quiet=True)
        assert convert(config, from_callable(fn, **shape, **names), quiet=True) == Path(config.out)
    with pytest.raises(ReleaseError, match="holds something else"):
        convert(config, from_callable(at_ties, **shape, name="ours, of June"), quiet=True)


def test_the_planner_says_whether_the_shards_are_enough(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    few, many = (planning.make_plan(run(shards=n), (1, 28, 28), tuple("0123456789")).advice for n in (20, 5000))
    assert "too few" in few[-1]
    assert few[-1].startswith("too few: below about 135 models")
    assert many[-1].startswith("enough:")
    assert "units of information" in few[0]
    assert not any("expect" in line and "to" in line and "90 %" in line for line in few)
    assert any("has 90 %, of 10 classes, expect 65 to 88 %" in line for line in many)
    # One word on the shards, whatever is wrong with them, and no advice that leads back.
    for records, shards, word in ((1437, 200, "too few records"), (1437, 24, "too few"), (60_000, 4000, "too small")):
        planned = planning.make_plan(
            run(shards=shards, expected_records=records), (1, 28, 28), tuple("0123456789")
        ).advice
        assert planned[-1].startswith(f"{word}:")
        assert sum(line.startswith(("too", "enough")) for line in planned) == 1
    hundred = tuple(str(k) for k in range(100))
    shards_of_60 = planning.make_plan(run(shards=1000, expected_records=60_000), (1, 28, 28), hundred).advice
    assert shards_of_60[-1].startswith("too few records:")
    auto = {
        epsilon: planning.with_way(run(shards="auto", expected_records=60_000, epsilon=epsilon))
        for epsilon in (1.0, 10.0)
    }
    assert [config.shards for config in auto.values()] == [1000, 500]
    assert not list(tmp_path.glob("home/ledgers/*"))


def test_what_the_planner_expects_holds_for_every_set_measured(run: Callable[..., ModelConfig]) -> None:
    """docs/benchmarks/model.json: the share of what a private teacher of the same ε has above chance."""
    rows = json.loads((Path(__file__).parents[1] / "docs/benchmarks/model.json").read_text())
    today = [row for row in rows if row["unit"] == "record" and "WaveletNet" in row["note"]]
    teachers = {(r["dataset"], r["epsilon"]): r["teacher_mean"] for r in today if r["setting"] == "private-teacher"}
    votes_of = [row for row in today if row["setting"] == "votes" and "evened" in row["note"]]
    assert {row["dataset"] for row in votes_of} == {"mnist", "fashion_mnist", "cifar10"}
    for row in votes_of:
        models = int(re.findall(r"(\d+) shards", row["note"])[0])
        s = gaussian_multiplier(row["epsilon"], row["delta"])
        low, high = votes.expected_shares(models**2 / (2 * s * s))
        share = (row["mean"] - 0.1) / (teachers[row["dataset"], row["epsilon"]] - 0.1)
        assert low - 0.01 <= share <= high + 0.01, row
        shards = run(shards=models, expected_records=60_000, epsilon=row["epsilon"])
        said = planning.make_plan(shards, (1, 28, 28), tuple("0123456789")).advice
        assert any("so far apart were our sets" in line for line in said), row


def test_a_safetensors_teacher_names_its_architecture(
    tmp_path: Path, run: Callable[..., ModelConfig], theirs: str
) -> None:
    config = run(
        teacher=str(tmp_path / "t.safetensors"),
        architecture=theirs,
        shape="1,8,8",
        attested_epsilon=1.0,
        attested_delta=1e-5,
    )
    assert verify(convert(config, quiet=True)).ok


def test_one_data_set_has_one_unit(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    convert(run(out=str(tmp_path / "first"), shards=4, id_column="person"), quiet=True)
    with pytest.raises(LedgerError):
        convert(run(budget=5.0), quiet=True)


def test_ids_are_read_from_an_npz(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", 9)
    assert load_images(path, id_column="person").ids is not None
    assert load_images(path).ids is None
    assert to_unit(load_images(path).images).shape == (9, 1, 8, 8)
    with pytest.raises(InputError, match="images"):
        load_images(path, id_column="images")
    with pytest.raises(InputError, match="ids"):
        load_images("digits", id_column="person")


def test_one_query_a_round_is_enough(run: Callable[..., ModelConfig]) -> None:
    """Half of one is none: of the second round's, all are of the prior. It ended there, paid for."""
    out = convert(run(shards=5, settings={"queries": 1, "rounds": 2}), quiet=True)
    assert verify(out).ok


def test_a_converted_release_is_no_answer_to_the_run_of_its_teacher(
    tmp_path: Path, run: Callable[..., ModelConfig]
) -> None:
    """It has the teacher's config.toml, ledger and run, and settings of its own."""
    first = convert(run(), quiet=True)
    other = str(tmp_path / "other")
    convert(run(teacher=str(first), out=other, per_class=3, seed=9), quiet=True)
    with pytest.raises(ReleaseError, match="holds something else"):
        convert(run(out=other), quiet=True)


def test_a_teacher_that_is_not_there(run: Callable[..., ModelConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        convert(run(teacher=str(tmp_path / "typo.onnx")), quiet=True)
    with pytest.raises(ConfigError, match="at most 1e6"):
        run(teacher="t.onnx", attested_epsilon=1e25, attested_delta=1e-5)


def test_classes_of_a_model_are_called_what_the_person_says(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    teacher = str(onnx_teacher(tmp_path / "t.onnx"))
    attested = {"teacher": teacher, "attested_epsilon": 2.0, "attested_delta": 1e-5}
    assert certificate(convert(run(**attested, class_names="cat,dog,eel"), quiet=True))["release"]["class_names"] == [
        "cat",
        "dog",
        "eel",
    ]
    for names in ("cat,dog", "cat,cat,dog"):
        with pytest.raises(ConfigError, match="expected 3 different names"):
            convert(run(**attested, class_names=names, out=str(tmp_path / "other")), quiet=True)


def test_a_test_run_of_the_papers_way_ends(tmp_path: Path, run: Callable[..., ModelConfig]) -> None:
    teacher = str(onnx_teacher(tmp_path / "t.onnx"))
    out = convert(run(teacher=teacher, accept_no_record_guarantee=True), quiet=True, insecure_seed=1)
    assert not verify(out).ok
