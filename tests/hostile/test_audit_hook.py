"""Nothing that is read unpickles, starts a process or opens a socket: the interpreter itself is asked, in a fresh process."""

import subprocess
import sys
from pathlib import Path

import numpy as np

import small_files
import small_models
import small_release

SCRIPT = """
import sys
from pathlib import Path
seen = []
BAD = ("pickle.", "subprocess.", "socket.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "ftplib.", "urllib.",
       "http.", "smtplib.", "marshal.loads_user", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "pty.")
sys.addaudithook(lambda name, args: seen.append((what, name)) if name.startswith(BAD) and (what[:6], name) != ("ledger", "os.mkdir")
                 else None)
what = "import"
import dpdistill.data
started = [m for m in ("torch", "pyarrow", "sklearn", "scipy") if m in sys.modules]
assert not started, f"importing dpdistill.data imported {started}"
from dpdistill.errors import DpdistillError

def data(spec):
    dpdistill.data.load_images(spec, n_classes=3 if "idx" in spec else None)

def verify(spec):
    from dpdistill.bundle.verification import verify as run
    assert run(spec).ok == ("tampered" not in spec), run(spec).problems
    if "tampered" in spec:
        raise DpdistillError("no")

def report(spec):
    from dpdistill.bundle.report import render_report
    from dpdistill.bundle.verification import open_release
    found = open_release(spec)
    render_report(found.certificate, found.contents)

def evaluate(spec):
    from dpdistill.bundle.release import load_student, read_bundle
    read_bundle(spec)
    if "model" in spec:
        load_student(spec)

def config(spec):
    from dpdistill.config_files import read
    read(Path(spec), {}, [])

def figures(spec):
    from dpdistill.cli.review import read_evaluation
    read_evaluation(Path(spec))

def ledger(spec):
    from dpdistill.privacy import Ledger
    Ledger.open(Path(spec), cap=(3, 1e-5)).close()

def teacher(spec):
    from dpdistill.models.teachers import load_teacher
    safe = spec.endswith(".safetensors")
    load_teacher(spec, architecture="fuzzing:network" if safe else None, image_shape=(1, 8, 8) if safe else (3, 8, 8))

def bring(spec):
    from dpdistill.config import ModelConfig
    from dpdistill.conversion import bring as run
    run(ModelConfig(teacher=spec))

def sample(spec):
    from dpdistill.sampling import load_sampler
    load_sampler(spec)

import contextlib, warnings
for line in sys.argv[1:]:
    verb, spec, wanted = line.split("=")
    if verb == "import":  # packages may look for a compiler or, as urllib3 below diffusers, for IPv6: not because of any file
        import fuzzing
        from dpdistill.models import few_step
        few_step.diffusers()
        from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
        seen.clear()
        continue
    what = line
    try:
        globals()[verb](spec)
    except DpdistillError as error:
        found = "refused"
    else:
        found = "loaded"
    assert found == wanted, (line, found)
assert not seen, seen
import pickle
pickle.loads(pickle.dumps(dpdistill.errors.ConfigError))
assert [name for _, name in seen] == ["pickle.find_class"], "the hook itself must work"
print("quiet")
"""


def test_no_pickle_process_or_socket_whatever_is_read(tmp_path: Path) -> None:
    data = [
        small_files.npz(tmp_path / "x.npz"),
        small_files.idx(tmp_path / "idx", zipped=True),
        small_files.parquet(tmp_path / "x.parquet"),
        small_files.arrow(tmp_path / "x.arrow"),
        "digits",
        *[small_files.folder(tmp_path / kind, kind, f".{kind.lower()}") for kind in ("PNG", "JPEG", "BMP", "WEBP")],
    ]
    words = [f"data={path}=loaded" for path in data]
    words.append(f"data={small_files.npz(tmp_path / 'object.npz', images=np.array([object()] * 6))}=refused")
    (tmp_path / "c.toml").write_text('data = "x.npz"\n')
    (tmp_path / "e.json").write_text('{"mean": 0.5}')
    words += [f"config={tmp_path / 'c.toml'}=loaded", "import=fuzzing=", f"figures={tmp_path / 'e.json'}=loaded"]
    for number, base in enumerate((small_models.a_convnet(), small_models.a_normed())):
        (tmp_path / f"{number}.onnx").write_bytes(base.SerializeToString())
        words.append(f"teacher={tmp_path / f'{number}.onnx'}=loaded")
    for name in ("loop", "external data", "pickle", "custom operation"):
        raw = small_models.CASES[name][0]
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(raw if isinstance(raw, bytes) else raw.SerializeToString())
        words.append(f"teacher={path}=refused")
    fuzz_weights = tmp_path / "w.safetensors"
    fuzz_weights.write_bytes(small_models.raw_safetensors("{}"))
    (tmp_path / "t.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    words += [f"teacher={fuzz_weights}=refused", f"teacher={tmp_path / 't.pt'}=refused"]
    for kind in ("dataset", "model", "diffusion"):
        folder = small_release.write(tmp_path / kind, kind)
        tampered = small_release.write(tmp_path / f"tampered {kind}", kind)
        (tampered / "dataset" / "train.parquet").write_bytes(b"PAR1" + bytes(200) + b"PAR1")
        small_release.Kit.seal(tampered)
        words += [
            f"verify={folder}=loaded",
            f"verify={tampered}=refused",
            f"report={folder}=loaded",
            f"evaluate={folder}=loaded",
        ]
        words += [f"sample={folder}={'loaded' if kind == 'diffusion' else 'refused'}", f"report={tampered}=refused"]
        words += [f"bring={folder}={'loaded' if kind == 'model' else 'refused'}", f"sample={tampered}=refused"]
    words.append(f"ledger={tmp_path / 'dataset' / 'ledger.jsonl'}=loaded")
    (tmp_path / "other").write_bytes(b"Dear Diary")
    words.append(f"ledger={tmp_path / 'other'}=refused")
    helpers = Path(small_files.__file__).parent
    # -B: a module that is imported for the first time would be written into Python's cache.
    command = [sys.executable, "-B", "-c", f"import sys; sys.path.append({str(helpers)!r})\n{SCRIPT}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "quiet\n"
    assert (tmp_path / "other").read_bytes() == b"Dear Diary"
