"""Settings from TOML, flags and assignments: who wins, what is refused, and what the public file holds."""

import dataclasses
import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from dpdistill.config import DiffusionConfig, ModelConfig, RunConfig
from dpdistill.config_files import build, config_hash, public_toml, read
from dpdistill.errors import ConfigError
from dpdistill.methods import METHODS, MODEL_METHODS
from dpdistill.methods.joint import Config as Joint


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """One field of each kind that a method's settings use."""

    whole: int = 3
    real: float = 0.5
    text: str = "x"
    yes: bool = False
    perhaps: float | None = None
    place: str | None = None
    either: float | Literal["auto"] = "auto"
    word: Literal["a", "b"] = "a"


def test_flags_win_over_the_file_and_assignments_over_both(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('data = "ä.npz"\nepsilon = 2\nseed = 4\nper_class = 5\n[settings]\nsteps = 7\nlr = 0.1\n', "utf-8")
    config = read(file, {"epsilon": 3.0, "seed": None, "out": "o"}, ["per_class=6", "steps=8", "settings.width=9"])
    assert (config.data, config.epsilon, config.seed, config.per_class, config.out) == ("ä.npz", 3.0, 4, 6, "o")
    assert config.settings == {"steps": "8", "lr": 0.1, "width": "9"}
    assert type(config.epsilon) is float
    assert build(Joint, config.settings).steps == 8
    assert read(None, {"data": "d"}, ["settings.epsilon=2"]).epsilon == 2.0
    assert read(None, {"data": "d"}, ["augment=a=b"]).settings == {"augment": "a=b"}
    assert read(None, {"data": "d", "epsilon": 5.0}, ["epsilon=2", "epsilon=4"]).epsilon == 4.0


def test_defaults_are_those_of_the_dataclass() -> None:
    assert read(None, {"data": "d"}, []) == RunConfig(data="d")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("epsilonn", "did you mean epsilon?"),
        ("per-class", "did you mean per_class?"),
        ("ouput", "did you mean out?"),
        ("zzzzqqq", "known: data, out"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, near: str) -> None:
    (tmp_path / "c.toml").write_text(f'data = "d"\n{key} = 1\n')
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "c.toml", {}, [])
    assert f"unknown setting {key}" in str(error.value)
    assert near in str(error.value)


def test_an_unknown_setting_names_the_nearest_of_both_places() -> None:
    others = [item.name for item in dataclasses.fields(RunConfig)]
    with pytest.raises(ConfigError, match=r"unknown setting settings\.stepz; did you mean settings\.steps\?"):
        build(Joint, {"stepz": 1}, "settings.", others)
    with pytest.raises(ConfigError, match=r"unknown setting settings\.epsilonn; did you mean epsilon\?"):
        build(Joint, {"epsilonn": 1}, "settings.", others)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("whole", "7", 7),
        ("whole", 7.0, 7),
        ("whole", "-7", -7),
        ("real", "1e-3", 0.001),
        ("real", 2, 2.0),
        ("text", "none", "none"),
        ("text", "", ""),
        ("yes", "true", True),
        ("yes", "false", False),
        ("yes", True, True),
        ("perhaps", "none", None),
        ("perhaps", "", None),
        ("perhaps", None, None),
        ("perhaps", "2", 2.0),
        ("place", "none", None),
        ("place", "", None),
        ("place", "a/b", "a/b"),
        ("either", "auto", "auto"),
        ("either", "0.25", 0.25),
        ("either", 1, 1.0),
        ("word", "b", "b"),
    ],
)
def test_conversion(name: str, value: Any, wanted: Any) -> None:
    got = getattr(build(Kinds, {name: value}), name)
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", "7.5"),
        ("whole", 7.5),
        ("whole", True),
        ("whole", "many"),
        ("whole", float("inf")),  # int(inf) is an OverflowError, not a ValueError
        ("whole", float("nan")),
        ("whole", None),
        ("whole", [1]),
        ("whole", {"a": 1}),
        ("real", "nan"),
        ("real", "inf"),
        ("real", float("nan")),
        ("real", 10**400),
        ("real", True),
        ("real", "much"),
        ("real", []),
        ("text", 5),
        ("text", ["a"]),
        ("text", True),
        ("yes", 1),
        ("yes", "yes"),
        ("yes", None),
        ("perhaps", "auto"),
        ("perhaps", [None]),
        ("place", 5),
        ("either", "automatic"),
        ("either", "nan"),
        ("word", "c"),
        ("word", 1),
    ],
    ids=str,
)
def test_a_wrong_type_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"s.{name} = .*: expected ") as error:
        build(Kinds, {name: value}, "s.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"delta": 1e-11},
        {"epsilon": 1001.0},
        {"delta": float("nan")},
        {"per_class": 0},
        {"per_class": 1001},
        {"epsilon": 2.0, "budget": 1.9},
        {"budget": float("inf")},
        {"budget": float("nan")},
        {"seed": -1},
        {"seed": 2**63},
        {"classes": 0},
        {"device": "tpu"},
    ],
    ids=str,
)
def test_out_of_range(changes: dict[str, Any]) -> None:
    name = list(changes)[-1]
    with pytest.raises(ConfigError, match=f"(?i)expected.*{name}|{name}.*expected"):
        RunConfig(data="d", **changes)
    with pytest.raises(ConfigError, match=name):  # the same by text, as on the command line
        read(None, {"data": "d"}, [f"{key}={value}" for key, value in changes.items()])


def test_values_from_python_are_plain(tmp_path: Path) -> None:
    """A loop over numpy's numbers, a path, or a whole float makes the configuration that the command line makes."""
    given: dict[str, Any] = {"seed": np.int64(3), "per_class": 2.0, "epsilon": np.float64(2), "delta": "1e-5"}
    config = RunConfig(data=tmp_path, out=tmp_path / "o", channels=np.int64(1), **given)  # type: ignore[arg-type]
    assert config == RunConfig(
        data=str(tmp_path), out=str(tmp_path / "o"), channels=1, seed=3, per_class=2, epsilon=2.0
    )
    assert [type(v) for v in (config.seed, config.per_class, config.epsilon, config.data)] == [int, int, float, str]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": True},
        {"seed": 0.5},
        {"epsilon": "much"},
        {"class_names": ("a", "b")},
        {"auxiliary": None},
        {"per_class": np.arange(2)},
        {"device": np.arange(2)},
        {"channels": np.arange(2)},
        {"budget": np.arange(2)},
    ],
    ids=str,
)
def test_a_wrong_type_from_python_is_one_line(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"^{name} = .*: expected "):
        RunConfig(data="d", **changes)


def test_bounds_that_hold() -> None:
    RunConfig(data="d", epsilon=1e-3, budget=1e-3, delta=0.5, per_class=1000, seed=2**63 - 1)
    RunConfig(data="d", epsilon=1000.0, delta=1e-10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epsilon = ", "not TOML"),
        ("epsilon = 1\nepsilon = 2", "not TOML"),
        ("settings = 5", "expected a table"),
        ("[settings]\nx = 1\n[data]\ny = 1", "data = "),
        ('data = "d"\nepsilon = 1979-05-27', "epsilon = "),
        ('data = "d"\nepsilon = true', "epsilon = "),
        ("epsilon = 2", "missing: data"),
        ('data = "\udcff"', "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
    ids=range(9),
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        read(file, {}, [])


def test_what_is_missing_is_named_as_it_is_given() -> None:
    with pytest.raises(ConfigError, match="missing: data; give --data"):
        read(None, {}, [])
    with pytest.raises(ConfigError, match=r"missing: settings\.models; give --set models=…"):
        build(MODEL_METHODS["votes"].Config, {}, "settings.")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("whole", "int"), ("perhaps", "float or none"), ("either", "float or auto"), ("word", "a or b")],
)
def test_a_value_of_another_kind_says_which_there_are(name: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"settings\.{name} = 'foo': expected {wanted}$"):
        build(Kinds, {name: "foo"}, "settings.")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.toml", "does not exist"), (tmp_path, "not a regular file")):
        with pytest.raises(ConfigError, match=message):
            read(path, {}, [])


@pytest.mark.parametrize("wrong", ["steps", "settings", "=5"])
def test_an_assignment_that_is_none(wrong: str) -> None:
    with pytest.raises(ConfigError):
        build(Joint, read(None, {"data": "d"}, [wrong]).settings, "settings.")
    with pytest.raises(ConfigError, match=r"settings\.settings"):
        build(Joint, read(None, {"data": "d"}, ["settings=5"]).settings, "settings.")


def test_the_public_file_holds_no_path_and_parses_back() -> None:
    config = RunConfig(data="/secret/records.npz", out="/secret/out", ledger="/secret/l", auxiliary="/secret/aux.npz")
    settings = Joint(per_class=10, procedural=0.5)
    text = public_toml(config, settings, 1.25)
    values = tomllib.loads(text)
    assert "/" not in text.split("\n", 1)[1]
    assert "records" not in text.split("\n", 1)[1]
    assert values["auxiliary"] == "aux.npz"
    assert values["noise_multiplier"] == 1.25
    assert build(Joint, values["settings"]) == settings
    assert {name: values[name] for name in ("method", "epsilon", "delta", "per_class", "seed")} == {
        "method": "joint",
        "epsilon": 1.0,
        "delta": 1e-5,
        "per_class": 10,
        "seed": 0,
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_every_method_parse_back(name: str) -> None:
    kind = METHODS[name].Config
    values = tomllib.loads(public_toml(RunConfig(data="d", method=name), kind(), 1.0))
    assert build(kind, values["settings"]) == kind()


def test_any_name_of_an_auxiliary_file_is_toml() -> None:
    for name in ('a"b', "a\\b", "a\nb", "a\x01b", "a\x7fb", "日本", "a\u2028b", "none", ".."):
        text = public_toml(RunConfig(data="d", auxiliary="/x/" + name), Joint(), 1.0)
        assert tomllib.loads(text)["auxiliary"] == name
    bytes_that_are_no_text = public_toml(RunConfig(data="d", auxiliary="/x/a\udcffb"), Joint(), 1.0)
    assert tomllib.loads(bytes_that_are_no_text)["auxiliary"] == "a?b"
    config_hash(bytes_that_are_no_text)


def test_the_hash_is_of_what_shaped_the_result() -> None:
    base = RunConfig(data="d", epsilon=3.0)
    text = public_toml(base, Joint(), 1.25)
    assert config_hash(text) == hashlib.sha256(text.encode()).hexdigest()
    for same in (
        dataclasses.replace(base, data="elsewhere", out="x", budget=9.0, ledger="l", device="cuda"),
        dataclasses.replace(base, epsilon=3),  # from Python, where nothing converts it
        read(None, {"data": "d"}, ["epsilon=3"]),
    ):
        assert public_toml(same, Joint(), 1.25) == text
    for change in ({"seed": 1}, {"epsilon": 3.5}, {"delta": 1e-6}, {"auxiliary": "a.npz"}, {"per_class": 11}):
        assert public_toml(dataclasses.replace(base, **change), Joint(), 1.25) != text
    for settings, sigma in ((Joint(steps=399), 1.25), (Joint(), 1.26)):
        assert public_toml(base, settings, sigma) != text


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (
            RunConfig(data="d"),
            [
                *({"resize": 8}, {"channels": 1}, {"split": "x"}, {"image_column": "x"}, {"label_column": "x"}),
                *({"value_low": 0.0, "value_high": high} for high in (1.0, 255.0)),
            ],
        ),
        (ModelConfig(data="d", shards=5, method="votes"), [{"id_column": "x"}, {"resize": 8}]),
        (DiffusionConfig(data="d", expected_records=9), [{"unlabelled": True}, {"resize": 8}]),
        (
            ModelConfig(teacher="t", attested_epsilon=1, attested_delta=0.1, method="conversion"),
            [
                *({"attested_epsilon": 2.0}, {"attested_delta": 0.2}, {"attested_unit": "person"}),
                *({"architecture": "a:b"}, {"shape": "1,8,8"}, {"input_low": -1.0}, {"input_high": 255.0}),
                *({"mean": "0.5"}, {"std": "0.5"}, {"layout": "NHWC"}, {"outputs": "logits"}),
            ],
        ),
    ],
    ids=["dataset", "model", "diffusion", "teacher"],
)
def test_how_it_is_read_is_in_the_public_file(config: RunConfig, others: list[dict[str, Any]]) -> None:
    texts = [public_toml(dataclasses.replace(config, **change), Joint(), 1.0) for change in ({}, *others)]
    assert len(set(texts)) == len(texts)
    for change, text in zip(others, texts[1:], strict=True):
        values = tomllib.loads(text)
        assert change.items() <= (values | values["reading"]).items()
    assert public_toml(config, Joint(), 1.0, "f" * 64) != texts[0]
    of_python = RunConfig(data="d", value_low=0, value_high=1)  # nothing converts them
    assert public_toml(of_python, Joint(), 1.0) == public_toml(
        RunConfig(data="d", value_low=0.0, value_high=1.0), Joint(), 1.0
    )


def test_more_settings_than_a_release_may_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="shorter names"):
        public_toml(RunConfig(data="d", label_column="x" * 2**14), Joint(), 1.0)


def test_every_way_out_that_a_reader_names_exists() -> None:
    """Where an error says `--set name=…` or `--flag`, that is a setting of a run."""
    source = Path(__file__).parents[1] / "src" / "dpdistill"
    text = "".join(path.read_text() for place in ("data", "models/teachers") for path in (source / place).glob("*.py"))
    named = set(re.findall(r"--set ([a-z_]+)=", text)) | {
        flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", text)
    }
    known = {item.name for kind in (ModelConfig, DiffusionConfig) for item in dataclasses.fields(kind)}
    assert {"image_column", "split", "channels", "layout", "value_low"} <= named
    assert named - {"set"} <= known
    assert not re.findall(r'"[^"]*\b(?:pass|say) [a-z_]+=', text)  # Python's names, which the command line has not
