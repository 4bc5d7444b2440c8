"""From a release to an audited release: canaries, controls, membership, two worlds; what verify then says, and what it refuses."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crash_cases import audit_blindly
from dpdistill import cli, planning
from dpdistill.audit import bounds, kernel, one_run, result, run, two_worlds
from dpdistill.audit.one_run import Witness
from dpdistill.audit.twin import Twin, _scaled, configuration, public_records
from dpdistill.bundle import reading, verify
from dpdistill.bundle.release import add_audit
from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.data import load_images
from dpdistill.errors import BudgetError, ConfigError, ReleaseError
from dpdistill.mechanisms import Vault
from dpdistill.pipeline import distil
from dpdistill.planning import make_plan
from dpdistill.privacy import GaussianSum, Ledger, gaussian_multiplier

Config = Callable[..., RunConfig]
TINY: dict[str, Any] = {  # settings of `joint` that make a run a matter of a moment
    "steps": 2,
    "networks": 2,
    "pool": 40,
    "feature_dims": 12,
    "pixel_dims": 16,
    "components": 2,
    "width": 8,
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """tiny(**changes) -> the configuration of a run on digits."""
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(planning, "N_PROCEDURAL", 200)

    def make(**changes: Any) -> RunConfig:
        plain = {"data": "digits", "out": str(tmp_path / "out"), "per_class": 1, "epsilon": 4.0, "settings": TINY}
        return RunConfig(**plain | changes)

    return make


def coins(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def twin(config: RunConfig, seed: int = 0, most: int = 500, n: int = 1437) -> Twin:
    records = load_images("digits")
    records = dataclasses.replace(records, images=records.images[:n], labels=records.labels[:n])
    return Twin.of(config, records, most, coins(seed))


@pytest.fixture
def small_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK", 20_000)


def fake_audit(**changes: Any) -> result.Audit:
    """An audit with every part, about ε = 1.287 at 1e-5."""
    one = kernel.audit("gaussian_sum", 1.287, 1e-5, draws=20_000, coins=coins(0), seed=0)
    scores, b = coins(1).standard_normal(60), coins(2).random(60) < 0.5
    facts: dict[str, Any] = {
        "epsilon": 1.287,
        "delta": 1e-5,
        "confidence": 0.95,
        "twin": "digits, 100 public records",
        "blind": "",
        "kernel": (one,),
        "one_run": one_run.judge(scores, b, 4, 1.287, 1e-5, coins(3)),
        "two_worlds": (result.TwoWorlds(seen="noisy sums", runs=500, lower_gdp=0.9, lower=0.4),),
        "membership": (
            result.Membership(
                who="records",
                attack="loss of the student",
                members=80,
                others=20,
                auc=(0.5, 0.4, 0.6),
                power=(0.01, 0.0, 0.05),
                power_allowed=0.036,
            ),
        ),
    }
    return result.Audit(**facts | changes)


def test_canaries_are_made_here_and_their_coins_are_fair(tiny: Config) -> None:
    ready = twin(tiny())
    assert len(ready.canaries.labels) == min(500, len(ready.records.labels) // 4) == 287
    assert len(ready.records.labels) + len(ready.others.labels) == len(load_images("digits").labels)
    assert 0.35 < ready.included.mean() < 0.65
    again = twin(tiny(), seed=1)
    assert not np.array_equal(ready.canaries.images, again.canaries.images)
    assert not np.array_equal(ready.included, again.included)
    with pytest.raises(ConfigError, match="at least"):
        Twin.of(
            tiny(),
            dataclasses.replace(ready.others, images=ready.others.images[:60], labels=ready.others.labels[:60]),
            9,
            coins(0),
        )


def test_the_witness_changes_no_answer(tiny: Config, tmp_path: Path) -> None:
    """The same key, with a witness and without: the method gets the same sums, and the ledger is the same."""
    from dpdistill.mechanisms import PrivateData

    ready = twin(tiny(), most=40)
    sums, ledgers = [], []
    for place in ("plain", "watched"):
        vault = Vault.open(tmp_path / place / "vault", insecure_seed=3)
        with Ledger.open(tmp_path / place / "ledger.jsonl", cap=(1e9, 1e-5), data="x") as ledger:
            if place == "plain":
                joined = one_run.joined(ready.records, ready.canaries, ready.included)
                handle = PrivateData(joined, ledger, vault)
            else:
                handle = Witness(ready.records, ready.canaries, ready.included, ledger, vault)
            query = GaussianSum(name="sums", dim=64, n_classes=10, noise_multiplier=2.0)
            sums.append(handle.release(query, lambda x, y: x.flatten(1)))
            features = handle.features(lambda x: x.flatten(1) + 2, 64)
            rank_one = GaussianSum(name="rank one", dim=128, noise_multiplier=2.0, grid_bits=30)
            sums.append(features.release_reserved(handle.reserve(rank_one), 0, lambda phi, y: phi[:, :2]))
            ledgers.append((tmp_path / place / "ledger.jsonl").read_bytes())
    assert ledgers[0] == ledgers[1]
    assert (sums[0] == sums[2]).all()
    assert (sums[1] == sums[3]).all()
    assert handle.told.releases == 2  # type: ignore[attr-defined]


def test_scores_find_canaries_where_there_is_hardly_any_noise(tiny: Config) -> None:
    """Through the door at a hundredth of the noise, every coin is read off the sums: the signs and the bookkeeping are right."""
    ready = twin(tiny(epsilon=1.0), most=60, n=400)
    told, made = ready.run(noise=0.01, whole=False, seed=5, quiet=True)
    assert made is None
    assert told.releases == ready.releases == 5
    scores = told.scores()
    assert scores[ready.included].min() > scores[~ready.included].max()
    assert np.abs(np.abs(scores) - 0.5).max() < 0.25


def one_release(ready: Twin, epsilon: float, noise: float, seed: int, place: Path) -> tuple[one_run.Told, Any]:
    """A single sum of pixels by class, worth `epsilon` at its full noise, through the door; and the coins of this run."""
    included = coins(seed).random(len(ready.included)) < 0.5
    sigma = gaussian_multiplier(epsilon, 1e-5) * noise
    vault = Vault.open(place / "vault", insecure_seed=seed)
    with Ledger.open(place / "ledger.jsonl", cap=(1e12, 1e-5), data="x") as ledger:
        witness = Witness(ready.records, ready.canaries, included, ledger, vault)
        witness.release(
            GaussianSum(name="pixels", dim=64, n_classes=10, noise_multiplier=sigma), lambda x, y: x.flatten(1)
        )
    return witness.told, included


def test_correct_runs_stay_below_and_broken_ones_alarm(tiny: Config, tmp_path: Path) -> None:
    """20 releases at ε = 1 through the door, with their noise and with a tenth of it: 0 alarms, 20 alarms."""
    ready, alarms = twin(tiny(epsilon=1.0), n=500), {1.0: 0, 0.1: 0}
    for seed in range(20):
        for noise in alarms:
            told, included = one_release(ready, 1.0, noise, seed, tmp_path / f"{seed}-{noise}")
            found = bounds.one_run(told.scores(), included, 1e-5)
            alarms[noise] += max(found.steinke, found.fdp) > 1.0
    assert alarms == {1.0: 0, 0.1: 20}


def test_the_null_control_on_stored_scores(tiny: Config, tmp_path: Path) -> None:
    told, included = one_release(twin(tiny(epsilon=4.0), n=800), 4.0, 1.0, 1, tmp_path)
    found = one_run.judge(told.scores(), included, 1, 4.0, 1e-5, coins(1))
    assert found.null_trials == 200
    assert found.null_alarms <= 19  # 5 % and three standard deviations
    assert 0.3 < found.fdp <= 4.0  # of a real signal
    assert found.expected_fdp[0] < found.fdp + 0.5
    assert sum(found.scores_in) + sum(found.scores_out) == found.canaries


def test_an_audited_release_verifies_and_says_so(tiny: Config, small_kernel: None, tmp_path: Path) -> None:
    out = distil(tiny(), quiet=True)
    before = json.loads((out / "certificate.json").read_text())
    assert before["audit"] is None
    found = run.audit_release(out, quick=True, seed=2)
    add_audit(out, found)
    verdict = verify(out)
    assert verdict.ok, verdict.problems
    assert "can refute, not confirm" in " ".join(verdict.unchecked)
    after = json.loads((out / "certificate.json").read_text())
    assert {**after, "audit": None, "pages": ""} == {**before, "pages": ""}
    assert after["audit"]["says"] == "An audit can refute, not confirm."
    assert after["audit"]["one_run"]["canaries"] == 287
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for text in (page, card):
        assert after["audit"]["one_run"]["canaries"].__str__() in text
        assert "An audit can refute, not confirm." in text
    assert '<svg role="img" aria-labelledby="lower-bounds"' in page
    assert "<script" not in page
    # The same audit again gives the same bytes, and the command that made the release still knows it.
    files = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    add_audit(out, found)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == files
    assert distil(tiny(), quiet=True) == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_membership_of_a_whole_twin(tiny: Config) -> None:
    from dpdistill.audit import membership

    ready = twin(tiny(), most=40)
    _, made = ready.run(seed=1, quiet=True)
    assert made is not None
    found = membership.measure(ready, made)
    assert [(m.who, m.members + m.others) for m in found] == [("records", 1437), ("canaries", 40)]
    for m in found:
        assert m.auc[0] < 0.7
        assert m.power[1] <= m.power_allowed == pytest.approx(np.exp(4) * 0.01 + 1e-5)
    # It finds what is there to be found: images that are the records.
    copied = dataclasses.replace(
        made, images=torch_images(ready), labels=torch_labels(ready), soft_labels=None, parts=1
    )
    assert membership.measure(ready, copied)[0].auc[0] > 0.99


def torch_images(ready: Twin) -> Any:
    import torch

    return torch.from_numpy(ready.records.to_unit())


def torch_labels(ready: Twin) -> Any:
    import torch

    return torch.from_numpy(ready.records.labels)


def test_two_worlds_end_to_end(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs: nothing is proved of a few as they are; of a few more without noise worth the name, more than the claim."""
    found = two_worlds.audit(tiny(), 2, seed=1)
    assert [(pair.seen, pair.runs) for pair in found] == [("noisy sums", 1), ("released images", 1)]
    assert all(max(pair.lower, pair.lower_gdp) <= 4 for pair in found)

    def quiet(*arguments: Any) -> Any:
        plan = make_plan(*arguments)
        return dataclasses.replace(plan, releases=[_scaled(planned, 0.02) for planned in plan.releases])

    monkeypatch.setattr(two_worlds, "make_plan", quiet)
    (sums, _) = two_worlds.audit(tiny(epsilon=0.5), 32, seed=1)
    assert sums.lower_gdp > 0.5


@pytest.mark.parametrize("method", ["dosser", "ndpdc"])
def test_two_worlds_of_a_baseline(method: str, tiny: Config) -> None:
    """With the settings that a release of it has."""
    few = {"steps": 3} if method == "ndpdc" else {"sampling_steps": 3, "optimisation_steps": 4, "subspace_dim": 2}
    found = two_worlds.audit(
        tiny(method=method, settings={**few, "expected_records_per_class": 140, "parts": 2}), 2, seed=1
    )
    assert [(pair.seen, pair.runs) for pair in found] == [("noisy sums", 1), ("released images", 1)]


def test_two_worlds_that_cannot_be_made_are_refused_at_once(
    audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not left out in silence after minutes."""
    for name in ("kernels", "public_records"):
        monkeypatch.setattr(run, name, lambda *_, **__: pytest.fail("begun"))
    monkeypatch.setattr(two_worlds, "CHEAP", {})
    code, _, err = typed(monkeypatch, capsys, "audit", audited, "--two-worlds", 10)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "no two-world audit of 'joint'" in err
    assert "leave --two-worlds out" in err


# --- what the certificate takes


def edited(audit: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    copy: Any = json.loads(json.dumps(audit))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def test_what_is_written_reads_back() -> None:
    found = fake_audit()
    assert result.parse(json.loads(json.dumps(found.describe()))) is not None
    assert result.parse(found.describe()).describe() == found.describe()  # type: ignore[union-attr]
    assert result.parse(None) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("says",), "Confirmed."),
        (("epsilon",), 1.0),
        (("epsilon",), "1.28700"),
        (("epsilon",), "nan"),
        (("kernel", 0, "lower"), "1e999"),
        (("kernel", 0, "draws"), -1),
        (("kernel", 0, "draws"), True),
        (("kernel", 0, "mechanism"), "<script>"),
        (("kernel",), "none"),
        (("one_run", "canaries"), "5"),
        (("one_run", "extra"), 1),
        (("membership", 0, "auc"), ["0.5"] * 101),
        (("twin",), "x" * 301),
    ],
)
def test_anything_else_is_refused(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        result.parse(edited(fake_audit().describe(), *path, value=value))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audited release; read it only."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPDISTILL_HOME", str(folder / "home"))
        patch.setattr(planning, "N_PROCEDURAL", 200)
        out = distil(
            RunConfig(data="digits", out=str(folder / "out"), per_class=1, epsilon=4.0, settings=TINY), quiet=True
        )
    epsilon = float(json.loads((out / "certificate.json").read_text())["guarantee"]["epsilon"])
    add_audit(out, fake_audit(epsilon=epsilon))
    return out


@pytest.fixture
def audited(pristine: Path, tmp_path: Path) -> Path:
    """One of one's own, to break."""
    return Path(shutil.copytree(pristine, tmp_path / "out"))


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("one_run", "fdp"), "4.5", "refutes the claim: one run"),
        (("kernel", 0, "lower"), "9.0", "refutes the claim: kernel"),
        (("kernel", 0, "faults"), ["spread"], "refutes the claim: kernel"),
        (("two_worlds", 0, "lower"), "5.0", "refutes the claim: two worlds"),
        (("one_run", "null_alarms"), 100, "refutes the claim: one run"),
        (("epsilon",), "2.0", "another claim"),
        (("delta",), "0.001", "another claim"),
        (("one_run", "steinke"), "0.123", "not the page"),
        (("kernel", 0, "lower"), "inf", "missing or of another kind"),
    ],
)
def test_a_lie_in_the_audit_is_caught(audited: Path, path: tuple[Any, ...], value: Any, reason: str) -> None:
    certificate = json.loads((audited / "certificate.json").read_text())
    certificate["audit"] = edited(certificate["audit"], *path, value=value)
    (audited / "certificate.json").write_text(
        json.dumps(certificate, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    )
    files = {name: (audited / name).read_bytes() for name in reading.SIZES}
    (audited / "SHA256SUMS").write_bytes(reading.checksums(files))
    verdict = verify(audited)
    assert not verdict.ok
    assert reason in " ".join(verdict.problems)


def test_a_refuted_audit_is_not_written(audited: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(audited.rglob("*")) if path.is_file()}
    epsilon = float(json.loads((audited / "certificate.json").read_text())["guarantee"]["epsilon"])
    with pytest.raises(ReleaseError, match="refutes"):
        add_audit(
            audited,
            fake_audit(epsilon=epsilon, two_worlds=(result.TwoWorlds(seen="x", runs=1, lower_gdp=9.0, lower=0.0),)),
        )
    assert {path: path.read_bytes() for path in sorted(audited.rglob("*")) if path.is_file()} == before
    assert verify(audited).ok


def test_a_crash_between_the_two_renames_is_put_right(audited: Path) -> None:
    """From its very beginning: the command reads the release before it attacks it."""
    before = audited.with_name("out.before")
    audited.rename(before)
    (problem,) = verify(audited).problems
    assert "left it as .before beside: `dpdistill audit` again puts it back" in problem
    audit_blindly(audited)
    assert verify(audited).ok
    assert not before.exists()


def test_what_a_stopped_audit_left_is_not_made_again(
    tiny: Config, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that made the release finds it aside, and does not ask for its price once more; what is another's it leaves alone."""
    monkeypatch.setenv("DPDISTILL_HOME", str(pristine.parent / "home"))
    before = Path(shutil.copytree(pristine, tmp_path / "out.before"))
    with pytest.raises(BudgetError):
        distil(tiny(per_class=2), quiet=True)
    assert before.is_dir()
    assert distil(tiny(), quiet=True) == tmp_path / "out"
    assert not before.exists()
    assert verify(tmp_path / "out").ok


def test_an_audit_from_within_the_folder(audited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(audited)
    epsilon = float(json.loads((audited / "certificate.json").read_text())["guarantee"]["epsilon"])
    add_audit(Path("."), fake_audit(epsilon=epsilon))
    assert verify(audited).ok
    assert sorted(path.name for path in audited.parent.iterdir()) == ["out"]


# --- the twin's configuration


def test_the_twin_has_the_releases_own_settings(tiny: Config) -> None:
    toml = 'method = "teacher"\nepsilon = 2.0\ndelta = 1e-6\nper_class = 3\nseed = 5\n[settings]\nper_class = 3\nwidth = 8\n'
    config = configuration({"release": {"kind": "model"}}, toml, "digits", "none", "cpu")
    assert isinstance(config, ModelConfig)
    assert (config.way, config.epsilon, config.delta, config.per_class, config.seed) == ("teacher", 2.0, 1e-6, 3, 5)
    assert config.settings == {"width": 8}
    voting = toml.replace("teacher", "votes") + "models = 30\nunit_moves = 1\n"
    votes = configuration({"release": {"kind": "model"}}, voting, "digits", "none", "cpu")
    assert isinstance(votes, ModelConfig)
    assert (votes.way, votes.shards) == ("votes", 30)
    diffusing = toml.replace("teacher", "dpsad") + "expected_records = 77\n"
    drawn = configuration({"release": {"kind": "diffusion"}}, diffusing, "digits", "none", "cpu")
    assert isinstance(drawn, DiffusionConfig)
    assert (drawn.method, drawn.expected_records) == ("dpsad", 77)
    fitted = public_records("digits", (3, 12, 10))
    assert fitted.image_shape == (3, 12, 10)
    assert fitted.images.dtype == np.uint8


# --- the command


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(cli.console, "width", 200)
    monkeypatch.setattr(sys, "argv", ["dpdistill", *map(str, words)])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command(
    tiny: Config,
    small_kernel: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "EPSILONS", (4.0,))
    monkeypatch.setattr(run, "every_kind", lambda: [("gaussian_sum", 1.0, 4.0), ("noisy_votes", 1.0, 4.0)])
    code, out, _ = typed(monkeypatch, capsys, "audit", "--kernel", "--quick", "--json", tmp_path / "k.json")
    assert code == 0
    assert "kernel noisy_votes" in out
    assert "can refute, not confirm" in out
    assert json.loads((tmp_path / "k.json").read_text())["kernel"][0]["draws"] == 20_000
    release = distil(tiny(), quiet=True)
    code, out, err = typed(monkeypatch, capsys, "audit", release, "--quick")
    assert (code, "Traceback" in err) == (0, False)
    assert "one run, 287 canaries" in out
    assert verify(release).ok
    # A bound above the claim: exit code 1, and the release stays as it is.
    before = (release / "certificate.json").read_bytes()
    monkeypatch.setattr(kernel.bounds, "epsilon_of", lambda mu, delta, q=1.0: 99.0)
    code, out, _ = typed(monkeypatch, capsys, "audit", release, "--quick")
    assert code == 1
    assert "REFUTED  kernel gaussian_sum" in out
    assert (release / "certificate.json").read_bytes() == before
    # Bad input: exit code 2 and one line.
    for words in (
        ("audit",),
        ("audit", release, "--kernel"),
        ("audit", tmp_path / "nowhere"),
        ("audit", release, "--json", release / "x"),
    ):
        code, _, err = typed(monkeypatch, capsys, *words)
        assert code == 2
        assert len(err.strip().splitlines()) == 1


def test_an_audit_by_a_link_is_of_what_it_leads_to(audited: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(audited)
    epsilon = float(json.loads((audited / "certificate.json").read_text())["guarantee"]["epsilon"])
    before = (audited / "certificate.json").read_bytes()
    add_audit(tmp_path / "latest", fake_audit(epsilon=epsilon, twin="digits, 101 public records"))
    assert (tmp_path / "latest").is_symlink()
    assert (audited / "certificate.json").read_bytes() != before
    assert sorted(os.listdir(tmp_path)) == ["latest", "out"]


@pytest.mark.parametrize("what", ["a note", "a link", "a file"])
def test_what_somebody_keeps_beside_a_release_is_not_removed(what: str, audited: Path, tmp_path: Path) -> None:
    aside = tmp_path / "out.before"
    if what == "a note":
        shutil.copytree(audited, aside)
        (aside / "note.txt").write_text("of before the audit")
    elif what == "a link":
        aside.symlink_to(tmp_path)
    else:
        aside.write_text("")
    epsilon = float(json.loads((audited / "certificate.json").read_text())["guarantee"]["epsilon"])
    for act in (
        lambda: add_audit(audited, fake_audit(epsilon=epsilon)),
        lambda: run.audit_release(audited, quick=True),
    ):
        with pytest.raises(ReleaseError, match=r"before is in the way: .*move it away"):
            act()
    assert os.path.lexists(aside)
    assert what != "a note" or (aside / "note.txt").exists()


def test_two_worlds_that_cannot_be_are_refused_before_the_audit(audited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "kernels", lambda *_, **__: pytest.fail("the audit has begun"))
    with pytest.raises(ConfigError, match="two runs in each world"):
        run.audit_release(audited, runs=1)
    monkeypatch.setattr(run.two_worlds, "prepare", lambda _: (_ for _ in ()).throw(ConfigError("no such plan")))
    with pytest.raises(ConfigError, match="no such plan"):
        run.audit_release(audited, runs=4)


def test_tiny_runs_of_two_worlds_are_grey_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the release's images and its student's shape are."""
    monkeypatch.setattr(planning, "N_PROCEDURAL", 100)
    colour = str(tmp_path / "colour.npz")
    np.savez(colour, images=np.zeros((9, 8, 8, 3), np.uint8), labels=np.zeros(9, np.int64))
    assert two_worlds.prepare(RunConfig(data="digits", auxiliary=colour))[1].releases
    assert two_worlds.prepare(ModelConfig(data="digits", settings={"groups": 8}))[1].releases
