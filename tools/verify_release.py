#!/usr/bin/env python3
"""Checks a release of dpdistill without dpdistill: Python's standard library, numpy, and the format's own pages.

A second opinion, written from docs/bundle.md, docs/ledger.md and docs/privacy/: no line of it is the library's, no number an accountant's.
Exit code 0: it holds; 1: not; 2: no DIR. ε epsilon, δ delta, σ noise multiplier, q sampling rate, T count, L loss, h its step."""

import argparse
import json
import math
import re
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np

IMAGES, VAE = "dataset/synthetic.safetensors", "pipeline/vae/diffusion_pytorch_model.safetensors"
FILES = f"""README.md SHA256SUMS certificate.json config.toml conversion.toml ledger.jsonl report.html samples.png {IMAGES}
dataset/train.parquet model/config.json model/generator.safetensors model/student.onnx model/student.safetensors {VAE}
pipeline/model_index.json pipeline/scheduler/scheduler_config.json pipeline/transformer/config.json"""
FILES = {*FILES.split(), "pipeline/vae/config.json", "pipeline/transformer/diffusion_pytorch_model.safetensors"}
INNER = {str(parent) for name in FILES for parent in Path(name).parents}
KINDS = {"dataset": ("dataset/",), "model": ("dataset/", "model/"), "diffusion": ("dataset/", "pipeline/")}
BITS = {".safetensors": 30, ".onnx": 30, ".parquet": 30, ".html": 27, ".png": 27, ".jsonl": 26}  # log2; 22 elsewhere
TEXT, WORD, WHOLE, NUMBER = ".{0,300}", "[A-Za-z]{1,30}", "[1-9][0-9]{0,15}", "[0-9][0-9.e+-]*"
ID, CAP = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}", {"cap_epsilon": NUMBER, "cap_delta": NUMBER}
LINES = {"cap": CAP, "final": {"run": ID}, "run": {"run": ID, "method": ID, "config": "[0-9a-f]{64}"}}
LINES["open"] = {"format": "dpdistill-ledger-1", "data": ID, "unit": WORD, "relation": "add_or_remove_one", **CAP}
LINES["intent"] = {"run": ID, "again": "|[0-9]+-[0-9]+", "count": int, "query": dict}
QUERY, SHARDS = {"mechanism": TEXT, "name": TEXT, "noise_multiplier": NUMBER}, {"models": WHOLE, "unit_moves": "[12]"}
SUM = {"dim": WHOLE, "grid_bits": "[89]|[12][0-9]|30", "clip_norm": NUMBER}
QUERIES = {"gaussian_sum": QUERY | SUM | {"classes": WHOLE, "sampling_prob": NUMBER}, "shard_sum": QUERY | SUM | SHARDS}
QUERIES["noisy_votes"] = QUERY | SHARDS | {"queries": WHOLE, "classes": WHOLE}
ATTESTED = {"kind": "attested", "teacher": ID, "epsilon": NUMBER, "delta": NUMBER, "unit": WORD}
FREE = dict.fromkeys(("auxiliary", "python", "dpdistill", "dp-accounting", "numpy", "torch", "pages"), TEXT)
VARYING = dict.fromkeys(("version", "rdp_epsilon", "coordinates", "distance_to_ideal"))
WORDS = {"69d594f3d7e4f114161c9337e2291e2b", "a92f3873d06191086693360fa3b39404"}  # docs/bundle.md#words: records,
WORDS |= {"ed81d798296e4a9c37c5b63e62c6fa6a", "f88073979fc4023d5d1a6d3bb8e1a29d"}  # shards; other units; attested
UNCHECKED = """      not checkable: who made it, that the code ran as stated, the noise key erased, the ledger complete
      taken as claimed: the auxiliary sentence, seed, versions, record-wise checks, figures (an audit's too), the Rényi ceiling
      left to `dpdistill verify`: the Parquet table, samples.png, the networks' architecture, config.toml, pages beyond the promise"""
canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
pretty = json.JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False).encode


def need(holds, problem):
    if not holds:
        raise ValueError(problem)


def fits(found, forms):
    """Refuses an object unless it has these fields: texts of a pattern, numbers in the form that reads back, or a type."""
    need(set(found) == set(forms), "unknown or missing fields")
    for value, form in ((found[key], form) for key, form in forms.items()):
        good = type(value) is form if isinstance(form, type) else re.fullmatch(form, value) and value.isprintable()
        need(good and (form != NUMBER or repr(float(value)) == value), f"{value} is none, or in another form")


def read_folder(folder):
    """Every file's bytes by its path: plain files of a bounded size, each read once, whose hashes hold."""
    found = {}
    for path in Path(folder).rglob("*"):
        name = str(path.relative_to(folder))
        need(name in FILES | INNER and not path.is_symlink(), f"{name} does not belong to a release")
        if name in FILES:
            need(path.is_file() and path.stat().st_size <= 1 << BITS.get(path.suffix, 22), f"{name} is too large")
            found[name] = path.read_bytes()
        need(name in FILES or any(path.iterdir()), f"{name} is empty")
    sums = [f"{sha256(found[name]).hexdigest()}  {name}\n" for name in sorted(set(found) - {"SHA256SUMS"})]
    need(found and "".join(sums).encode() == found["SHA256SUMS"], "no release is there, or SHA256SUMS does not hold")
    return found


@np.errstate(all="ignore")
def losses(q, sigma, exchange, h):
    """L = ln(dP/dQ) of one Gaussian on a Poisson sample, as (points, masses), of removing and adding a unit, or exchanging it."""
    stay, enter = math.log1p(-q) if q < 1 else -math.inf, math.log(q) - 1 / (2 * sigma**2)
    ends = np.array([-10 * sigma - exchange, 10 * sigma + 1])  # P(N > 10) < 1e-23
    ends = np.logaddexp(stay, enter + ends / sigma**2) - exchange * np.logaddexp(stay, enter - ends / sigma**2)
    grid = h * np.arange(math.floor(ends[0] / h), math.ceil(ends[1] / h) + 1)
    y = grid + np.log1p(np.maximum(-np.exp(stay - grid), -1)) - enter  # the x/σ² at which L is on the grid
    if exchange:
        y = grid / 2 + np.arcsinh(math.exp(stay - enter) * np.sinh(grid / 2))

    def cells(mean):  # what N(mean, σ²) has in each cell of the grid, from the nearer tail
        z = (sigma * y - mean / sigma) / math.sqrt(2)
        tail = np.fromiter(map(math.erfc, np.abs(z).tolist()), float, len(z)) / 2
        return np.where(z[1:] > 0, np.where(z[:-1] > 0, tail[:-1], 1 - tail[:-1]) - tail[1:], np.diff(tail))

    def connect(grid, p, q):  # each cell's to its ends, so that P and Q keep theirs: no divergence shrinks
        low = np.clip((q * np.exp(grid[1:]) - p) / math.expm1(h), 0, p)
        return grid, np.append(low, 0) + np.append(0, p - low)

    without = cells(0)
    upper, lower = (1 - q) * without + q * cells(1), (1 - q) * without + q * cells(-1) if exchange else without
    back = (grid, upper, lower) if exchange else (-grid[::-1], lower[::-1], upper[::-1])
    return connect(grid, upper, lower), connect(*back)


def compose(parts, delta, h):
    """ε of [(distribution of L, T)] by FFT. The window leaves out δ/10⁶ at either end (Chernoff), which δ then pays for."""
    tilts = np.outer([-1, 1], np.geomspace(0.1, 1e5, 12)).ravel()
    logs, spectrum, budget = math.log(1e6 / delta), 1, delta * (1 - 3e-6)
    for (grid, masses), count in parts:
        tops = np.maximum(tilts * grid[0], tilts * grid[-1])
        logs += count * (tops + [math.log(masses @ np.exp(tilts[i] * grid - tops[i])) for i in range(24)])
    low, high = math.floor((logs / tilts)[:12].max() / h), math.ceil((logs / tilts)[12:].min() / h)
    size = 1 << (high - low + 1).bit_length()
    need(size <= 2**23, "too much for one accounting")
    for (grid, masses), count in parts:
        spectrum = spectrum * np.fft.rfft(np.bincount(np.rint(grid / h).astype(int) % size, masses, size)) ** count
    first = max(low, 0, high - round(600 / h))  # ε is above, and exp() of what lies between is a number
    masses = np.roll(np.fft.irfft(spectrum, size), -low)[first - low :]
    loss = h * (np.arange(len(masses)) + first - high)  # from `high` down
    p_above, q_above = (np.cumsum(each[::-1])[::-1] for each in (masses, masses * np.exp(-loss)))
    k = int(np.argmax(p_above - np.exp(loss) * q_above <= budget))  # between two points it is linear in exp(ε)
    return h * high + (math.log((p_above[k] - budget) / q_above[k]) if k else float(loss[0]))


def epsilon(parts, delta, exchange=False):
    """ε of [(q, σ, T)]. What is unsampled is one Gaussian; with sampled parts by PLD, h = 1e-4, or 1e-3 where ε > 20."""
    square, sampled, found = sum(count / sigma**2 for q, sigma, count in parts if q == 1), Counter(), 0.0
    for q, sigma, count in (part for part in parts if part[0] < 1):
        sampled[q, sigma] += count
    if not sampled or min(sigma for _, sigma in sampled) < 0.09 or square > 0.09**-2:  # sampling only helps: left out
        mu = (1 + exchange) * math.sqrt(sum(count / sigma**2 for _, sigma, count in parts))
        low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
        for _ in range(100 if mu else 0):  # one Gaussian of sensitivity / standard deviation μ (Balle & Wang 2018)
            middle = (low + high) / 2
            a, b = (middle / mu - mu / 2) / math.sqrt(2), (middle / mu + mu / 2) / math.sqrt(2)
            tail = math.log(math.erfc(b)) if b < 26 else -b * b - math.log(b * math.sqrt(math.pi)) - 1 / (2 * b * b)
            low, high = (middle, high) if math.erfc(a) - math.exp(middle + tail) > 2 * delta else (low, middle)
        return high
    need(len(sampled) <= 64 and max(sampled.values()) <= 10**6, "too much for one accounting")
    for h in (1e-3, 1e-4):
        if found <= 20:
            pairs = [(losses(*group, exchange, h), count) for group, count in sampled.items()]
            pairs += [(losses(1.0, 1 / math.sqrt(square) / (1 + exchange), False, h), 1)] if square else []
            found = max(compose([(pair[way], count) for pair, count in pairs], delta, h) for way in (0, 1))
    return found


def read_ledger(raw):
    """Returns the lines, each run's state, and the cap. Every line is in its one form, chained, in order, and paid for."""
    lines, before, runs, parts, last = [], "0" * 64, {}, [], {}
    for text in raw.decode().removesuffix("\n").split("\n"):
        line = json.loads(text)
        kind, body = line["type"], {key: value for key, value in line.items() if key != "hash"}
        good = sha256((before + canonical(body)).encode()).hexdigest() == line["hash"] and canonical(line) == text
        need(good and (kind == "open") == (not lines), f"ledger line {len(lines) + 1} is damaged or out of place")
        fits(body, LINES[kind] | {"type": WORD})
        if "run" in line:
            state = runs.setdefault(line["run"], [])
            need(len(state) == (0 if kind == "run" else 2), "the ledger is out of the order of a run")
            state += {"run": [line.get("method"), line.get("config")], "intent": [], "final": ["ended"]}[kind]
        if kind in ("open", "cap"):
            cap = float(line["cap_epsilon"]), float(line["cap_delta"])
            need(cap[0] > 0 and 1e-10 <= cap[1] < 1, "the ledger has a cap that is none")
        if kind == "intent":
            query, count = line["query"], line["count"]
            fits(query, QUERIES[query["mechanism"]])
            q, sigma = float(query.get("sampling_prob", 1)), float(query["noise_multiplier"])
            need(1e-9 <= q <= 1 and 1e-6 <= sigma <= 1e9 and 1 <= count <= 10**12, "a charge that is none")
            need((query.get("unit_moves") != "1") == (lines[0]["unit"] == "record"), "a charge of another unit")
            parts.append(line.setdefault("part", (q, sigma, count)))
            line["exchanged"] = q, sigma * (1 + (query.get("unit_moves") == "1")), count  # 1: it stays in its shard
            last[cap] = len(parts)  # ε grows with every intent: the last one under a cap speaks for all
        lines.append(line)
        before = line["hash"]
    need(raw.endswith(b"\n") and len(lines) <= 200_000 and len(last) <= 64, "a line that is not whole, or too many")
    for (most, delta), count in last.items():
        need(epsilon(parts[:count], delta) <= most + 1e-4, f"the ledger passed its cap of {most}")
    return lines, runs, cap


def tensors(raw):
    """The arrays and metadata of a safetensors file in its one form: finite, without a hole or a byte too many."""
    begin, end, arrays = 8 + int.from_bytes(raw[:8], "little"), 0, {}
    found = json.loads(raw[8 : min(begin, 2**20)])
    wanted = {"__metadata__": found.pop("__metadata__")}
    for key, entry in sorted(found.items(), key=lambda item: (item[1]["dtype"] != "I64", item[0])):
        kind, shape, start = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]], entry["shape"], end
        need(len(shape) <= 8 and min(shape, default=1) > 0 and len(arrays) < 256, "tensors of another kind")
        end += math.prod(shape) * int(kind[2])
        wanted[key] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [start, end]}
        arrays[key] = np.frombuffer(raw, kind, math.prod(shape), begin + start).reshape(shape)
        need(np.isfinite(arrays[key]).all(), "tensors that are not finite")
    text = canonical(wanted).encode()
    need(raw[8:begin] == text + b" " * (-len(text) % 8) and begin + end == len(raw), "tensors in another form")
    return arrays, wanted["__metadata__"]


def describe(files):
    """What the files give under `release`. Refuses images, labels and weights that are none."""
    arrays, metadata = tensors(files[IMAGES])
    images, labels, soft = (arrays.pop(key, None) for key in ("images", "labels", "soft_labels"))
    (m, *shape), names = images.shape, json.loads(metadata["class_names"])
    parts, gain, k = int(metadata["parts"]), int(metadata["gain"]), len(names)
    told, rows = {"class_names": json.dumps(names), "parts": str(parts), "gain": str(gain)}, m * parts**2
    good = metadata == told | {"format": "pt", "range": "-1 to 1"} and 1 <= gain <= 64
    good &= type(names) is list and len(set(names)) == k and all(type(n) is str and n.isprintable() for n in names)
    good &= images.dtype == "<f4" and len(shape) == 3 and shape[0] in (1, 3) and 1 <= parts <= min(16, *shape[1:])
    good &= not arrays and labels.dtype == "<i8" and labels.shape == (m,) and 0 <= labels.min() <= labels.max() < k
    good = good and (abs(images) <= 1).all() and np.bincount(labels, minlength=k).tolist() == [m // k] * k
    good &= soft is None or (soft.dtype == "<f4" and soft.shape == (rows, k) and (abs(soft.sum(1) - 1) <= 1e-3).all())
    need(good, f"{IMAGES}: not the labelled images of a release")
    found = {"class_names": names, "image_shape": shape, "images": m, "per_class": m // k, "parts": parts}
    found |= {"gain": gain, "training_images": rows, "soft_labels": soft is not None}
    found |= {f"{name[:-5]}_sha256": sha256(raw).hexdigest() for name, raw in files.items() if name.endswith(".toml")}
    found["files"] = {n: sha256(b).hexdigest() for n, b in files.items() if n.startswith((IMAGES, "model/", "pipe"))}
    for name in (name for name in files if name.endswith(".safetensors") and name != IMAGES):
        weights, metadata = tensors(files[name])
        need(metadata == {"format": "pt"} and all(w.dtype == "<f4" for w in weights.values()), "no weights")
        field = "generator_parameters" if "generator" in name else "student_parameters"
        found |= {} if name == VAE else {field: sum(w.size for w in weights.values())}
    return found


def recount(raw, release, wanted):
    """Puts what the ledger gives into the wanted certificate. Returns every ε by its place there."""
    lines, runs, cap = read_ledger(raw)
    need(runs.get(release["run"]) == [release["method"], release["config_sha256"], "ended"], "another run, or no end")
    both, counts, dots = [line for line in lines if line["type"] == "intent"], Counter(), 0
    mine = [line for line in both if line["run"] == release["run"]]
    for line in mine:
        counts[canonical(line["query"])] += line["count"]
        dots += line["count"] * math.prod(int(line["query"].get(key, 1)) for key in ("dim", "classes", "queries"))
    wanted["mechanisms"] = [json.loads(query) | {"count": count} for query, count in sorted(counts.items())]
    wanted["randomness"]["coordinates"], wanted["accountant"]["version"] = dots, wanted["software"]["dp-accounting"]
    wanted["randomness"]["distance_to_ideal"] = repr(math.nextafter(dots * 2.0**-127, math.inf) if dots else 0.0)
    wanted["ledger"] |= {"data": lines[0]["data"], "lines": len(lines), "head": lines[-1]["hash"]}
    wanted["ledger"] |= {"sha256": sha256(raw).hexdigest(), "cap_epsilon": repr(cap[0]), "cap_delta": repr(cap[1])}
    wanted["guarantee"] |= {"basis": "proved", "unit": lines[0]["unit"]}
    delta, all_parts = float(wanted["guarantee"]["delta"]), [line["part"] for line in both]
    found = {("guarantee", "epsilon"): epsilon([line["part"] for line in mine], delta)}
    found["guarantee", "epsilon_replace_one"] = epsilon([line["exchanged"] for line in mine], delta, True)
    found["guarantee", "epsilon_all_runs"] = epsilon(all_parts, delta)
    return found | {("ledger", "spent_epsilon"): epsilon(all_parts, cap[1])}


def check(folder):
    """Returns the promise of a release. Raises, with one line or for want of a field, unless what is checked holds."""
    files = read_folder(folder)
    said, wanted = (json.loads(files["certificate.json"]) for _ in range(2))
    need((pretty(said) + "\n").encode() == files["certificate.json"], "certificate.json is not in its one form")
    g, release, claim, sentence = said["guarantee"], said["release"], said["claim"], said["statement"]
    need(g["basis"] != "none" and not release["run"].startswith("insecure-"), "NOT PRIVATE: no guarantee")
    names = {name for name in FILES if "/" not in name or name.startswith(KINDS[release["kind"]])}
    names -= ({"ledger.jsonl"} if claim else set()) | (set() if "conversion_sha256" in release else {"conversion.toml"})
    need(set(files) == names and (0 if claim else 1e-10) <= float(g["delta"]) < 1, "a file is missing, or δ is none")
    run = {key: release[key] for key in ("kind", "method", "run", "seed")}
    fits(run | {"delta": g["delta"]}, {"kind": WORD, "method": ID, "run": ID, "seed": int, "delta": NUMBER})
    wanted |= {"release": run | describe(files), "claim": claim or None}
    if claim:
        fits(claim | {"method": release["method"]}, ATTESTED | {"method": "conversion"})
        found = {("guarantee", "epsilon"): float(claim["epsilon"])}
        wanted["guarantee"] |= {key: claim.get(key) for key in {*g} - {"epsilon", "relation"}} | {"basis": "attested"}
        wanted |= {"mechanisms": [], "accountant": None, "randomness": None, "ledger": None}
    else:
        found = recount(files["ledger.jsonl"], release, wanted)
    for key in said:
        need(canonical(said[key]) == canonical(wanted[key]), f"certificate.json: {key} is not what the files give")
    for (section, key), value in found.items():
        text = said[section][key]
        need(f"{float(text):.3f}".rstrip("0").rstrip(".") == text, f"{key} is not rounded up to 1e-3")
        need(value - 1e-4 <= float(text) <= value * 1.001 + 2e-3, f"{key} is {text}, and has to be {value:.4f}")
    fits(said["checks"], {m["name"]: NUMBER for m in said["mechanisms"]})
    fits(said["figures"], dict.fromkeys(said["figures"], NUMBER))
    fits(said["software"] | {key: said[key] for key in ("auxiliary", "pages")}, FREE)
    need(all(float(worst) <= 0.02 for worst in said["checks"].values()), "a record-wise check failed")
    if (audit := said["audit"]) is not None:
        ones, whole = [audit["one_run"]][audit["one_run"] is None :], audit["epsilon"]
        pairs = [pair for k in audit["kernel"] for pair in ((k["lower"], k["epsilon"]), (len(k["faults"]), 0))]
        pairs += [(each[key], whole) for each in audit["two_worlds"] for key in ("lower", "lower_gdp")]
        pairs += [(each[key], whole) for each in ones for key in ("steinke", "fdp")]
        pairs += [(each["null_alarms"], 0.15 * each["null_trials"]) for each in ones]
        same = all(repr(float(f"{float(g[key]):.4g}")) == audit[key] for key in ("epsilon", "delta"))
        below = all(float(bound) <= float(most) < math.inf for bound, most in pairs)
        need(g["basis"] == "proved" and same and below, "the audit is of another claim, or refutes this one")
    figures = [g[key] for key in ("epsilon", "delta", "epsilon", "delta", "epsilon_replace_one", "epsilon_all_runs")]
    right = re.findall(NUMBER, sentence) == [text for text in figures if text] and "#" not in sentence
    skeleton = right and re.sub(NUMBER, "#", sentence).replace(f"one {g['unit']}", "one #")
    words = [sorted(part) for part in (set(said) ^ {"audit"}, g, said["ledger"] or ())]  # what releases of a kind share
    words += [skeleton, g["relation"], said["format"], said["limits"], said["assumptions"]]
    words += [any("models" in query for query in said["mechanisms"])]
    words += [(said[key] or {}) | VARYING for key in ("accountant", "randomness")]
    need(sha256(canonical(words).encode()).hexdigest()[:32] in WORDS, "certificate.json: other words or numbers")
    need(sentence.replace("'", "&#39;").encode() in files["README.md"], "README.md does not hold the promise")
    return sentence


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="DIR")
    try:
        print("PASS ", check(parser.parse_args().folder) + "\n" + UNCHECKED)
    except Exception as error:  # whatever a hostile folder leads to, one line
        reason = str(error) if type(error) is ValueError else f"it cannot be read ({type(error).__name__})"
        print("FAIL ", "".join(c if c.isprintable() else "?" for c in reason)[:300])
        raise SystemExit(1) from None
