"""The verbs, as a person types them: exit codes, one line on stderr, and nothing spent by looking. One process, but for the imports."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill import cli, pipeline, planning, sources
from dpdistill.bundle.onnx_file import student_onnx
from dpdistill.bundle.verification import verify
from dpdistill.data import Limits, load_images
from dpdistill.models.wavelet_net import WaveletNet

TINY = [
    "steps=4",
    "networks=1",
    "pool=12",
    "feature_dims=6",
    "pixel_dims=4",
    "components=2",
    "width=4",
]
SETTINGS = [word for name in TINY for word in ("--set", name)]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """dp("verify", "out") -> exit code, stdout, stderr; in a folder with private.npz and test.npz."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(planning, "N_PROCEDURAL", 40)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, n in (("private", 13), ("test", 6)):
        images = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(n) % 2, classes=np.array(["a", "b"]))

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpdistill", *map(str, words)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_release_from_first_look_to_page(dp: Cli, tmp_path: Path) -> None:
    """plan, dry run, dataset, the same again, verify, evaluate, report, and a flipped byte."""
    code, out, err = dp("plan", "--shape", "1,8,8", "--classes", 2, "--per-class", 1, *SETTINGS)
    assert (code, err) == (0, "")
    assert "joint-moments" in out
    assert "planned: ε = " in out
    command = ["dataset", "--data", "private.npz", "--out", "out", "--per-class", 1, *SETTINGS]
    code, dry, err = dp(*command, "--dry-run")
    assert (code, err) == (0, "")
    assert dry == out + "ledger: a new one would begin, with a cap of ε = 1 at δ = 1e-05\n"  # the plan needs no data
    assert names(tmp_path) == ["private.npz", "test.npz"]  # not even a home
    code, out, err = dp(*command)
    assert code == 0
    assert "record-level" in out or "ε" in out
    assert "release: out" in out
    assert "feature means" in err
    assert "Traceback" not in err
    ledger = next((tmp_path / "home" / "ledgers").iterdir())
    before = ledger.read_bytes()
    assert dp(*command)[:2] == (0, out)
    code, said, _ = dp(*command, "--dry-run")
    assert (code, said.splitlines()[-1]) == (0, "release: out is there already; nothing would be charged")
    assert ledger.read_bytes() == before

    code, out, err = dp("verify", "out")
    assert (code, err) == (0, "")
    assert out.startswith("PASS")
    code, out, _ = dp("evaluate", "out", "--data", "test.npz", "--epochs", 2, "--seeds", 2, "--out", "e.json")
    assert code == 0
    assert "not covered by the guarantee" in out
    assert len(json.loads((tmp_path / "e.json").read_text())["accuracies"]) == 2
    code, out, err = dp("report", "out", "--out", "page.html", "--evaluation", "e.json")
    assert (code, err) == (0, "")
    assert "accuracies" in (tmp_path / "page.html").read_text()
    # Labels go by the names of their classes, in whatever order a file lists these; of a file without names, by their numbers.
    mean = json.loads((tmp_path / "e.json").read_text())["mean"]
    given = dict(np.load("test.npz"))
    names_of = given.pop("classes")
    turned = {"labels": len(names_of) - 1 - given["labels"], "images": given["images"]}
    np.savez("turned.npz", classes=names_of[::-1], **turned)
    np.savez("bare.npz", **given)
    np.savez(
        "part.npz",
        classes=names_of[:1],
        images=given["images"][given["labels"] == 0],
        labels=given["labels"][given["labels"] == 0],
    )
    np.savez("strange.npz", classes=np.array(["zebra", *names_of[1:]]), **given)
    for file in ("turned.npz", "bare.npz", "part.npz"):
        code, _, err = dp("evaluate", "out", "--data", file, "--epochs", 2, "--seeds", 2, "--out", "f.json")
        assert (code, "is not" in err) == (0, False), (file, err)
        if file != "part.npz":
            assert json.loads((tmp_path / "f.json").read_text())["mean"] == mean, file
    code, _, err = dp("evaluate", "out", "--data", "strange.npz")
    assert (code, "has a class 'zebra' that the release has not" in err) == (2, True)
    np.savez("floats.npz", classes=names_of, labels=given["labels"], images=given["images"].astype(np.float32))
    read = ("--set", "value_low=0", "--set", "value_high=255")
    code, _, err = dp("evaluate", "out", "--data", "floats.npz", *read, "--epochs", 2, "--seeds", 2, "--out", "f.json")
    assert (code, json.loads((tmp_path / "f.json").read_text())["mean"]) == (0, mean)
    (tmp_path / "other.json").write_text(json.dumps({"mean": 1.0, "run": "another"}))
    for wrong in (
        ("report", "out", "--evaluation", "other.json"),
        ("evaluate", "out", "--data", "floats.npz"),
        ("audit", "out", "--quick", "--data", "floats.npz"),
        ("audit", "out", "--quick", "--json", "none/found.json"),
        ("evaluate", "out", "--data", "test.npz", "--out", "out/e.json"),
        ("evaluate", "out", "--data", "test.npz", "--out", "none/e.json"),
        ("evaluate", "out", "--data", "test.npz", "--resize", 16),
        ("evaluate", "none", "--data", "test.npz"),
        ("report", "out", "--out", "out/page.html"),
        ("report", "out", "--evaluation", "private.npz"),
    ):
        code, out, err = dp(*wrong)
        assert (code, out) == (2, ""), wrong
        assert err.startswith("dpdistill: "), wrong
        assert err.count("\n") == 1, wrong
    assert verify(tmp_path / "out").ok  # nothing was put into it
    pages = tmp_path / "out" / "report.html"
    pages.write_bytes(pages.read_bytes().replace(b"a", b"b", 1))
    assert dp("evaluate", "out", "--data", "test.npz")[0] == 2
    code, out, err = dp("verify", "out")
    assert (code, err) == (1, "")
    assert out.startswith("FAIL  report.html")
    assert dp("verify", "none")[0] == 1


def test_a_file_of_settings(dp: Cli, tmp_path: Path) -> None:
    text = 'data = "private.npz"\nclasses = 2\nper_class = 1\nepsilon = 9.0\n[settings]\nsteps = 3\n'
    (tmp_path / "c.toml").write_text(text)
    code, out, _ = dp("plan", "--shape", "1,8,8", "--config", "c.toml", "--epsilon", 2)
    assert code == 0
    assert "epsilon = 2.0" in out
    assert "steps = 3" in out
    assert "2 × " in out  # the file's two classes
    assert dp("dataset", "--config", "c.toml", "--dry-run", *SETTINGS)[0] == 0


def test_a_plan_shows_no_less_than_it_computes(dp: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[planning.Plan] = []
    make = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda *given: made.append(make(*given)) or made[-1])
    for epsilon in ("0.1", "0.2", "3"):
        _, out, _ = dp("plan", "--shape", "1,8,8", "--classes", 2, "--per-class", 1, *SETTINGS, "--epsilon", epsilon)
        (one, exchanged) = re.search(r"planned: ε = (\S+) at δ = 1e-05 \(exchanging one: (\S+)\)", out).groups()  # type: ignore[union-attr]
        assert made[-1].epsilon <= float(one) <= made[-1].epsilon + 1e-3
        assert made[-1].epsilon_replace_one <= float(exchanged) <= made[-1].epsilon_replace_one + 1e-3


def test_a_dry_run_says_whether_labels_of_public_images_were_read(dp: Cli, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(8) % 4)
    np.savez(tmp_path / "bare.npz", images=images)
    command = ["dataset", "--data", "private.npz", "--per-class", 1, *SETTINGS, "--dry-run", "--auxiliary"]
    assert "auxiliary: 8 public images and their labels were read" in dp(*command, "labelled.npz")[1]
    assert "auxiliary: 8 public images and no labels were read" in dp(*command, "bare.npz")[1]


@pytest.mark.parametrize(("flag", "name"), [("--data", "data"), ("--out", "out"), ("--auxiliary", "auxiliary")])
def test_an_empty_place_is_one_line(flag: str, name: str, dp: Cli, tmp_path: Path) -> None:
    given = {"--data": "private.npz", flag: ""}
    code, out, err = dp("dataset", *(word for item in given.items() for word in item))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{name} is empty; give --{name}" in err
    assert names(tmp_path) == ["private.npz", "test.npz"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("model", ["--set", "teacher_dims=6", "--set", "teacher_steps=2"]),
        ("model", ["--shards", 5, "--expected-records", 13, "--set", "queries=20"]),
        ("diffusion", ["--expected-records", 13]),
        ("diffusion", ["--expected-records", 13, "--method", "shards"]),
    ],
    ids=["teacher", "votes", "dpsad", "shards"],
)
def test_the_plan_of_a_model_needs_no_data(kind: str, more: list[object], dp: Cli, tmp_path: Path) -> None:
    given = ["--epsilon", 3, "--per-class", 1, *more]
    code, out, err = dp("plan", kind, "--shape", "1,8,8", "--classes", 2, *given)
    assert (code, err) == (0, "")
    assert "planned: ε = 3" in out or "planned: ε = 2.99" in out
    begins = "ledger: a new one would begin, with a cap of ε = 3 at δ = 1e-05\n"
    assert dp(kind, "--data", "private.npz", *given, "--dry-run") == (0, out + begins, "")
    assert names(tmp_path) == ["private.npz", "test.npz"]


@pytest.mark.parametrize(
    "given", [("dataset", "--shards"), ("diffusion", "--shards"), ("dataset", "--expected-records")]
)
def test_an_option_of_another_kind_s_plan(given: tuple[str, str], dp: Cli) -> None:
    kind, option = given
    code, out, err = dp("plan", kind, option, 5)
    assert (code, out) == (2, "")
    assert err.startswith(f"dpdistill: plan {kind} has no {option}")


def test_dp_merf_is_planned_like_any_other(dp: Cli) -> None:
    code, out, err = dp("plan", "dataset", "--method", "dpmerf", "--shape", "1,8,8", "--classes", 2)
    assert (code, err) == (0, "")
    assert "dpmerf-embedding" in out


def test_a_model_s_file_is_planned_as_a_model_s(dp: Cli, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('data = "private.npz"\nexpected_records = 13\nper_class = 1\n')
    code, out, _ = dp("plan", "diffusion", "--shape", "1,8,8", "--config", "c.toml")
    assert code == 0
    assert 'method = "dpsad"' in out
    assert "records a class" in out  # the advice
    for key, said in (("teacher", "have to be read"), ("teachers", "have to be read")):
        (tmp_path / "c.toml").write_text(f'{key} = "t.onnx"\n')
        code, out, err = dp("plan", "model", "--config", "c.toml")
        assert (code, out) == (2, "")
        assert said in err
    (tmp_path / "c.toml").write_text('method = "paper"\naccept_no_record_guarantee = true\nexpected_records = 9\n')
    code, out, err = dp("plan", "diffusion", "--config", "c.toml")
    assert (code, out) == (2, "")
    assert "nothing to plan" in err


PAPER = ["diffusion", "--method", "paper", "--accept-no-record-guarantee", "--expected-records", 13, "--dry-run"]


def test_a_dry_run_of_the_papers_form_reads_the_data_and_says_both_counts(dp: Cli, tmp_path: Path) -> None:
    code, out, err = dp(*PAPER, "--data", "private.npz", "--epsilon", 2, "--set", "steps=20")
    assert (code, err) == (0, "")
    assert "steps = 20" in out
    assert "NO differential-privacy guarantee for any record" in out
    assert "By the paper's own count ε = 2" in out
    assert "with the noise that was really added" in out
    for words, said in (
        (["--data", "none.npz"], "none.npz: does not exist"),
        (["--data", "private.npz", "--set", "stepz=3"], "did you mean settings.steps?"),
        (["--data", "private.npz", "--set", "student_width=6"], "student_width"),
    ):
        code, out, err = dp(*PAPER, *words)
        assert (code, out) == (2, "")
        assert said in err
    assert names(tmp_path) == ["private.npz", "test.npz"]


@pytest.mark.parametrize("verb", ["dataset", "model", "diffusion"])
def test_a_dry_run_for_a_device_that_is_not_there(verb: str, dp: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    more = ["--expected-records", 13] if verb == "diffusion" else []
    code, _, err = dp(verb, "--data", "private.npz", "--dry-run", "--device", "cuda", *more)
    assert code == 2
    assert "device cuda: this machine or this build of torch has none" in err


def test_a_dry_run_with_an_opaque_teacher_says_both_counts_and_what_it_is_fed(dp: Cli, tmp_path: Path) -> None:
    net = WaveletNet((1, 8, 8), 3, width=8, groups=4, generator=torch.Generator().manual_seed(0))
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    (tmp_path / "t.onnx").write_bytes(student_onnx(weights, net.config))
    command = ["model", "--teacher", "t.onnx", "--accept-no-record-guarantee", "--dry-run", "--input-high", 255]
    code, out, err = dp(*command, "--epsilon", 2, "--set", "steps=20")
    assert (code, err) == (0, "")
    assert "steps = 20" in out
    assert "NO differential-privacy guarantee for the teacher's training records" in out
    assert "by the paper's count 2;" in out
    assert "fed 0 for black and 255 for white (--input-low, --input-high)" in out
    code, out, err = dp(*command, "--set", "stepz=3")
    assert (code, out) == (2, "")
    assert "did you mean settings.steps?" in err
    assert names(tmp_path) == ["private.npz", "t.onnx", "test.npz"]
    line = "pixels: the teacher is fed 0 for black and 255 for white (--input-low, --input-high); a uint8 model gets 0 to 255"
    assert line in dp(*command)[1].splitlines()
    (tmp_path / "models").mkdir()
    for owner in range(2):  # of many owners, the same line
        net.head.bias.data += 0.01
        weights["head.bias"] = net.head.bias.data.numpy()
        (tmp_path / "models" / f"{owner}.onnx").write_bytes(student_onnx(weights, net.config))
    code, out, err = dp("model", "--teachers", "models", "--dry-run", "--input-high", 255)
    assert (code, err) == (0, "")
    assert line in out.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset", "--data", "none.npz"], "none.npz: does not exist"),
        (["dataset", "--data", ""], ""),
        (["dataset"], "missing: data; give --data"),
        (["diffusion", "--data", "private.npz"], "give --expected-records"),
        (
            ["diffusion", "--data", "private.npz", "--expected-records", "13", "--set", "warm_start=foo"],
            "settings.warm_start = 'foo': expected auto or mixture or embedding",
        ),
        (["dataset", "--data", "private.npz", "--set", "channels=2"], "channels = '2': expected 1 or 3 or none"),
        (["dataset", "--data", "private.npz", "--set", "share_tones=x"], "share_tones = 'x': expected float or auto"),
        (["dataset", "--data", "private.npz", "--method", "joined"], "unknown method 'joined'; known: joint"),
        (["dataset", "--data", "private.npz", "--set", "stepz=3"], "did you mean settings.steps?"),
        (["dataset", "--data", "private.npz", "--set", "epsilonn=3"], "did you mean epsilon?"),
        (["dataset", "--data", "private.npz", "--set", "steps"], "expected name=value"),
        (["dataset", "--data", "private.npz", "--set", "steps=x"], "settings.steps = 'x': expected int"),
        (["dataset", "--data", "private.npz", "--set", "epsilon=nan"], "epsilon = 'nan': expected float"),
        (["dataset", "--data", "private.npz", "--epsilon", "-1"], "epsilon of at least"),
        (["dataset", "--data", "private.npz", "--seed", "-1"], "seed in 0.."),
        (["dataset", "--data", "private.npz", "--device", "tpu"], "cpu or cuda"),
        (["dataset", "--data", "private.npz", "--config", "none.toml"], "none.toml: does not exist"),
        (["dataset", "--data", "private.npz", "--epsilon", "2", "--budget", "1"], "budget of at least"),
        (["dataset", "--data", "private.npz", "--out", "private.npz"], "choose another --out"),
        (["dataset", "--data", "private.npz", "--out", "private.npz/x", *SETTINGS], "choose another --out"),
        (["sample", "none", "--out", "x.tar"], "give --out a name ending in .npz or .parquet"),
        (["sample", "none", "--out", "x.npz", "--device", "tpu"], "cpu or cuda"),
        (["evaluate", "none", "--data", "test.npz", "--device", "tpu"], "cpu or cuda"),
        (["plan", "students"], "plan students: expected plan dataset, plan model, plan diffusion"),
        (["plan", "--shards", "5"], "plan dataset has no --shards"),
        (["plan", "diffusion"], "--expected-records"),
        (["plan", "--shape", "1,28"], "--shape 1,28: expected channels,height,width"),
        (["plan", "--shape", "a,b,c"], "--shape a,b,c"),
        (["plan", "--shape", "2,28,28"], "1 or 3 channels"),
        (["plan", "--shape", "1,4,28"], "8 to 64"),
        (["plan", "--shape", "3,-9,9999999"], "8 to 64"),
        (["plan", "--classes", "0"], "at least one class"),
        (
            ["plan", "--method", "dosser"],
            "expected_records_per_class",
        ),
    ],
    ids=lambda value: " ".join(value[:6]) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_with_the_way_out(words: list[str], message: str, dp: Cli) -> None:
    code, out, err = dp(*words)
    assert (code, out) == (2, "")
    assert err.startswith("dpdistill: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert message in err


def test_a_wrong_flag_has_exit_code_2(dp: Cli) -> None:
    """And one line, however long what was typed is."""
    for words, message in (
        (["dataset", "--epsilon", "much"], "Invalid value for '--epsilon'"),
        (["dataset", "--nonsense"], "No such option: --nonsense"),
        (["dataset", "--epsilo", "1"], "--epsilon"),
        (["dataset", "--epsilon"], "Option '--epsilon' requires an argument"),
        (["nonsense"], "No such command 'nonsense'"),
        (["evaluate", "o"], "Missing option '--data'"),
        (["verify"], "(see `dpdistill verify --help`)"),
        (["verify", "a", "b"], "unexpected extra argument"),
        (["sample", "o", "--out", "p", "--steps", "9"], "Invalid value for '--steps'"),
        (["dataset", "--non\x1bsense" + "e" * 300], "No such option"),
    ):
        code, out, err = dp(*words)
        assert (code, out) == (2, "")
        assert err.startswith("dpdistill: ")
        assert err.count("\n") == 1
        assert err[:-1].isprintable()
        assert message in err
        assert " --help`)" in err


def test_help_is_shown_where_it_is_asked_for(dp: Cli) -> None:
    for words in (["--help"], ["dataset", "--help"]):
        code, out, err = dp(*words)
        assert (code, err) == (0, "")
        assert "Usage:" in out
    assert "Usage:" in "".join(dp()[1:])


def test_a_disk_that_does_not_take_it(dp: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(pipeline, "distil", full)
    assert dp("dataset", "--data", "private.npz") == (2, "", "dpdistill: somewhere: No space left on device\n")


def test_ctrl_c_says_how_to_go_on(dp: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["dataset", "--data", "private.npz", "--out", "out", "--per-class", 1, *SETTINGS]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_bundle", stop)
        code, _, err = dp(*command)
    assert code == 130
    assert err.endswith("dpdistill: stopped; the same command goes on from here\n")
    assert "Traceback" not in err
    assert names(tmp_path) == ["home", "out.state", "private.npz", "test.npz"]
    ledger = next((tmp_path / "home" / "ledgers").iterdir())
    charges = ledger.read_bytes().count(b'"type":"intent"')
    assert dp(*command)[0] == 0
    assert ledger.read_bytes().count(b'"type":"intent"') == charges == 5
    assert names(tmp_path) == ["home", "out", "private.npz", "test.npz"]


def test_help_and_verify_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dpdistill import cli\n"
        "for words in (['--help'], ['verify', 'none'], ['dataset', '--help']):\n"
        "    sys.argv = ['dpdistill', *words]\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as stop:\n        print('exit', stop.code)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 0", "exit 1", "exit 0"]
    assert done.stdout.splitlines()[-1] == "False"
    for verb in ("plan", "dataset", "verify", "evaluate", "report"):
        assert verb in done.stdout


def test_a_reading_that_evaluate_does_not_know(dp: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped one would leave the accuracy of other labels than were meant. And one that it knows: how much to read."""
    assert dp("dataset", "--data", "private.npz", "--out", "out", "--per-class", 1, *SETTINGS)[0] == 0
    code, out, err = dp("evaluate", "out", "--data", "test.npz", "--set", "label_colum=foo")
    assert (code, out) == (2, "")
    assert "label_colum" in err
    read: list[Limits] = []
    monkeypatch.setattr(sources, "load_images", lambda *_, limits, **__: read.append(limits) or load_images("digits"))
    code, out, err = dp("evaluate", "out", "--data", "test.npz", "--max-gib", 7)
    assert (code, out) == (2, "")  # the digits are of other classes
    assert [limits.max_array_bytes for limits in read] == [7 * 2**30]
    assert not (tmp_path / "evaluation.json").exists()
