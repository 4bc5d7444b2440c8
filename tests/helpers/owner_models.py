"""Folders of owners' models to be played (`record_play`): a neighbour has another model in the place of one owner's, whatever it does.

The models are real ONNX files and pass the probe. What some do where no image of the probe is, no reader can know: there they answer NaN or
infinities, or fail. A folder that is refused before anything is charged is none of these: one model twice, or one that fails the probe.

N images, D pixels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dpdistill.models.teachers.probe import probe_images

SIDE, K = 8, 3
OWNERS = 5
node = helper.make_node


@dataclass(frozen=True, eq=False)
class Owners:
    """What is private: a model of every owner, in the order of their files."""

    models: tuple[bytes, ...]
    tags = ids = np.zeros(0, np.int64)  # no record, so nothing is sampled

    def readable(self) -> bool:
        return True

    def save(self, folder: Path) -> None:
        (folder / "owners").mkdir()
        for number, raw in enumerate(self.models):
            (folder / "owners" / f"{number}.onnx").write_bytes(raw)

    def exchanged(self, place: int, model: bytes) -> "Owners":
        """With another model in this owner's place."""
        return Owners((*self.models[:place], model, *self.models[place + 1 :]))


def saved(weights_DK: NDArray[Any], bias_K: NDArray[Any], more: Sequence[Any] = (), **constants: Any) -> bytes:
    """A classifier of images [N, 1, SIDE, SIDE] in [0, 1]: a linear one, to whose rows `z` other nodes may do more, as rows `y`."""
    nodes = [
        node("Flatten", ["x"], ["f"]),
        node("Gemm", ["f", "w", "b"], ["z"]),
        *(more or [node("Identity", ["z"], ["y"])]),
    ]
    constants |= {"w": weights_DK.astype(np.float32), "b": bias_K.astype(np.float32)}
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 1, SIDE, SIDE))
    graph = helper.make_graph(
        nodes, "g", [given], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def linear(number: int, scale: float = 1.0) -> bytes:
    """An owner's model like any other."""
    rng = np.random.default_rng([17, number])
    return saved(rng.normal(size=(SIDE * SIDE, K)) * scale, rng.normal(size=K) * scale)


def band(direction_D: NDArray[Any]) -> tuple[float, float]:
    """Middle and half width of the widest gap between what the probe's images are along this direction."""
    images_ND = (probe_images((1, SIDE, SIDE)).flatten(1).numpy() + 1) / 2
    along = np.sort(images_ND @ direction_D)
    widest = int(np.diff(along).argmax())
    return float(along[widest : widest + 2].mean()), float(np.diff(along).max()) * 0.45


def odd_in_a_band(number: int, nodes: Sequence[Any], **constants: Any) -> bytes:
    """A model that does something else with images between two of the probe's: `depth` [N, 1] is above 0 for those, else 0."""
    rng = np.random.default_rng([19, number])
    direction_D = rng.normal(size=SIDE * SIDE).astype(np.float32)
    middle, half = band(direction_D)
    more = [
        node("MatMul", ["f", "direction"], ["along"]),
        node("Sub", ["along", "middle"], ["from"]),
        node("Abs", ["from"], ["far"]),
        node("Sub", ["half", "far"], ["within"]),
        node("Relu", ["within"], ["depth"]),
        *nodes,
        node("Add", ["z", "odd"], ["y"]),
    ]
    constants |= {"direction": direction_D[:, None], "middle": np.float32(middle), "half": np.float32(half)}
    return saved(rng.normal(size=(SIDE * SIDE, K)), rng.normal(size=K), more, **constants)


def odd_models() -> dict[str, bytes]:
    """What an owner may bring that passes the probe."""
    w_DK = np.random.default_rng(23).normal(size=(SIDE * SIDE, K))
    zeros, alike = np.zeros(K), np.repeat(w_DK[:, :1], K, axis=1)
    one = np.zeros((SIDE * SIDE, K))
    one[0, 0] = 1
    negative = [node("Neg", ["depth"], ["d"]), node("Sqrt", ["d"], ["odd"])]
    outside = [node("Mul", ["depth", "far_out"], ["d"]), node("Cast", ["d"], ["i"], to=TensorProto.INT64)]
    outside += [node("Squeeze", ["i", "axis"], ["i1"]), node("Gather", ["table", "i1"], ["odd"])]
    table = {"far_out": np.float32(1e6), "axis": np.array([1], np.int64), "table": np.zeros((1, K), np.float32)}
    found = {
        "hardly moved by an image": saved(w_DK * 1e-4, np.array([5.0, 0.0, 0.0])),
        "always the first class": saved(w_DK, np.array([1e4, 0.0, 0.0])),
        "always the last class": saved(w_DK, np.array([0.0, 0.0, 1e4])),
        "ties everywhere": saved(alike, zeros),
        "one pixel": saved(one, zeros),
        "1e36": saved(w_DK * 1e36, zeros),
        "1e-5": saved(w_DK * 1e-5, zeros),
        "probabilities": saved(w_DK, zeros, [node("Softmax", ["z"], ["y"], axis=1)]),
        "nothing is sure": saved(w_DK * 1e-3, zeros, [node("Softmax", ["z"], ["y"], axis=1)]),
    }
    for number in range(4):
        found[f"NaN where no probe is {number}"] = odd_in_a_band(number, negative)
        infinite = [node("Mul", ["depth", "huge"], ["d"]), node("Mul", ["d", "huge"], ["odd"])]
        found[f"infinite where no probe is {number}"] = odd_in_a_band(number, infinite, huge=np.float32(1e30))
        found[f"fails where no probe is {number}"] = odd_in_a_band(number, outside, **table)
    return found


def neighbourhood(n_pairs: int) -> tuple[dict[str, Owners], list[tuple[str, str]]]:
    """Folders by name, and which are neighbours. "base" is the one that is recorded; "shuffled" has its models under other names."""
    base = Owners(tuple(linear(number) for number in range(OWNERS)))
    worlds, pairs = {"base": base}, list[tuple[str, str]]()
    last: dict[int, str] = {}  # by place: two that differ from the base in one owner alone are neighbours
    models = odd_models()
    number = 0
    while len(models) < n_pairs:
        number += 1
        models[f"another {number}"] = linear(100 + number, 10.0 ** (number % 7 - 3))
    for number, (name, model) in enumerate(models.items()):
        place = number % OWNERS
        worlds[name] = base.exchanged(place, model)
        pairs.append(("base", name))
        if place in last:
            pairs.append((last[place], name))
        last[place] = name
    worlds["shuffled"] = Owners(tuple(reversed(base.models)))
    return worlds, pairs
