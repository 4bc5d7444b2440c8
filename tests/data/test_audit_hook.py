"""No reader unpickles, starts a process or opens a socket: the interpreter itself is asked, in a fresh process."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
seen = []
BAD = ("pickle.", "subprocess.", "socket.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ftplib.", "urllib.",
       "marshal.loads_user", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.rmdir")
sys.addaudithook(lambda name, args: seen.append(name) if name.startswith(BAD) else None)
import dpdistill.data
from dpdistill.errors import InputError
started = [m for m in ("torch", "pyarrow", "sklearn", "scipy") if m in sys.modules]
assert not started, f"importing dpdistill.data imported {started}"
for spec in sys.argv[1:]:
    try:
        dpdistill.data.load_images(spec, n_classes=3 if "idx" in spec else None)
    except InputError as error:
        assert "object" in str(error), error
        print("refused")
    else:
        print("loaded")
dpdistill.data.procedural_images(3, 3, 8, 8, 0)
assert not seen, seen
sys.path.append(".")
import pickle; pickle.loads(pickle.dumps(InputError))
assert seen == ["pickle.find_class"], "the hook itself must work"
"""


@pytest.mark.timeout(60)
def test_no_pickle_process_or_socket(tmp_path, write):
    import numpy as np

    paths = [
        write.npz(tmp_path / "x.npz"),
        write.idx(tmp_path / "idx", zipped=True),
        write.parquet(tmp_path / "x.parquet"),
        write.arrow(tmp_path / "x.arrow"),
        "digits",
        *[write.folder(tmp_path / kind, kind, f".{kind.lower()}") for kind in ("PNG", "JPEG", "BMP", "WEBP")],
        write.npz(tmp_path / "object.npz", images=np.array([object()] * 6)),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded"] * (len(paths) - 1) + ["refused"]
