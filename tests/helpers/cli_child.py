"""The command line in children of one process: a fork after the imports, so that a hundred commands take seconds.

Run as a script it is that process: it reads a command per line, forks, and answers with what came of it. A child that crashes,
hangs or takes too much memory is seen and does no harm. In a process of its own, since a fork of the test runner would take its
threads' locks with it.
"""

import gc
import json
import os
import resource
import selectors
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

WARM = (
    ["verify", "none"],
    ["plan", "--shape", "1,8,8", "--classes", "2"],
    ["model", "--teacher", "t.onnx", "--attested-epsilon", "1", "--attested-delta", "1e-5"],
)
DEADLINE = 120.0  # seconds after which a child is killed; tests assert far less
ADDRESS_SPACE = 2**33  # bytes, so that a bomb which goes off ends a test and not the machine


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of a command: its exit code (negative: the signal that ended it), what it printed, CPU seconds, peak memory."""

    code: int
    out: str
    err: str
    seconds: float
    peak_mb: float


class Cli:
    """A process that has imported all that a command needs."""

    def __init__(self, release: Path) -> None:
        """Args: release: a good one, checked once, so that the children find ε of its ledger in a cache."""
        environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(release)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __call__(self, *words: object, cwd: Path, home: Path, file_bytes: int | None = None) -> Done:
        """Runs `dpdistill words`.

        Args:
          home: what DPDISTILL_HOME is.
          file_bytes: the most that a file may hold: a write beyond fails, as on a full disk.
        """
        assert self._server.stdin
        assert self._server.stdout
        asked = {"words": [os.fspath(w) if isinstance(w, Path) else str(w) for w in words]}
        asked |= {"cwd": str(cwd), "home": str(home), "file_bytes": file_bytes}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(timeout=30)
        assert self._server.stdout
        self._server.stdout.close()


def tree(*roots: Path) -> dict[str, Any]:
    """Everything under some folders: kind, size, time of change, link target, and the bytes of small files. Opens nothing else."""
    found = {}
    for root in roots:
        for place in [root, *root.rglob("*")]:
            if not os.path.lexists(place):
                continue
            status = place.lstat()
            facts: list[Any] = [stat.S_IFMT(status.st_mode), status.st_size, status.st_mtime_ns]
            if stat.S_ISLNK(status.st_mode):
                facts.append(os.readlink(place))
            elif stat.S_ISREG(status.st_mode) and status.st_size < 2**20:
                facts.append(sha256(place.read_bytes()).hexdigest())
            found[str(place)] = facts
    return found


def _child(asked: dict[str, Any], run: Callable[[], None]) -> int:
    """In the child: the exit code that the interpreter would give."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, hard))
    os.chdir(asked["cwd"])
    os.environ["DPDISTILL_HOME"] = asked["home"]
    sys.argv = ["dpdistill", *asked["words"]]
    if asked["file_bytes"] is not None:
        sys.dont_write_bytecode = True  # else Python 3.11 leaves halves of modules in its cache, for all
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"],) * 2)
    try:
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(run: Callable[[], int], seconds: float = DEADLINE) -> Done:
    """What came of a function in a forked child, which returns its exit code; one that takes longer is killed."""
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid == 0:
        for target, (_, end) in enumerate(pipes, start=1):
            os.dup2(end, target)
        code = 70
        try:
            code = run()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    texts: dict[int, list[bytes]] = {}
    limit = time.monotonic() + seconds
    with selectors.DefaultSelector() as waiting:
        for read, end in pipes:
            os.close(end)
            texts[read] = []
            waiting.register(read, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select(max(0.0, limit - time.monotonic())):
                chunk = os.read(key.fd, 2**16)
                texts[key.fd].append(chunk)
                if not chunk:
                    waiting.unregister(key.fd)
                    os.close(key.fd)
            if time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    out, err = (b"".join(chunks).decode(errors="replace") for chunks in texts.values())
    return Done(
        code=os.waitstatus_to_exitcode(status),
        out=out,
        err=err,
        seconds=used.ru_utime + used.ru_stime,
        peak_mb=used.ru_maxrss / 1024,
    )


def serve() -> None:
    """Answers commands until the input ends."""
    from dpdistill import cli, conversion, diffusion, pipeline, planning, sampling  # noqa: F401
    from dpdistill.bundle import report  # noqa: F401
    from dpdistill.data import parquet  # noqa: F401

    planning.N_PROCEDURAL = 40  # as tests/test_cli.py
    warm = (*WARM, ["verify", sys.argv[1]])
    for words in warm:  # what is imported on the way, each child would import again
        sys.argv = ["dpdistill", *words]
        with suppress(SystemExit), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            cli.main()
    gc.collect()
    gc.freeze()  # or a collection in a child would copy every page
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(vars(forked(lambda asked=asked: _child(asked, cli.main)))), flush=True)  # type: ignore[misc]


if __name__ == "__main__":
    serve()
