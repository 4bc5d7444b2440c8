"""Every exchange between the processes of a run, among threads that a stand-in for torch.distributed connects.

Real processes: tests/test_ranks.py. W processes.
"""

import io
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdistill import errors
from dpdistill.errors import DpdistillError, LedgerError, RanksError
from dpdistill.mechanisms import ensemble, private, ranks, vault
from dpdistill.mechanisms.ranks import ALONE, LOST, Distributed
from dpdistill.mechanisms.recordwise import probe, probed
from dpdistill.privacy import ledger, queries
from several import Place, every_release, models_of_owners, other_numbers, other_records


class Connected:
    """What `ranks` uses of torch.distributed, among W threads. A thread that does not come breaks it, with a RuntimeError as there."""

    def __init__(self, world: int) -> None:
        self.world, self.calls, self.words = world, [], []  # type: tuple[int, list[Any], list[list[int]]]
        self._meeting, self._held, self._here = threading.Barrier(world), [torch.empty(0)] * world, threading.local()

    def enter(self, rank: int) -> None:
        self._here.rank = rank

    def get_rank(self) -> int:
        return int(self._here.rank)

    def get_world_size(self) -> int:
        return self.world

    def break_up(self) -> None:
        self._meeting.abort()

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._held[self.get_rank()] = tensor.clone()
        self._meeting.wait(10)
        held = list(self._held)
        self._meeting.wait(10)
        return held

    def all_gather(self, into: list[Tensor], tensor: Tensor) -> None:
        self.words.append(tensor.tolist())
        for own, theirs in zip(into, self._exchange(tensor), strict=True):
            own.copy_(theirs)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self._exchange(tensor)[source])

    def reduce(self, tensor: Tensor, to: int) -> None:
        total = torch.stack(self._exchange(tensor)).sum(0)
        tensor.copy_(total if self.get_rank() == to else total - 7)  # elsewhere it is left in any state

    def is_initialized(self) -> bool:
        return bool(self.calls) and self.calls[-1] != "destroyed"

    def init_process_group(self, backend: str, timeout: timedelta) -> None:
        self.calls.append((backend, timeout))

    def barrier(self) -> None:
        self.calls.append("barrier")

    def destroy_process_group(self) -> None:
        self.calls.append("destroyed")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """together(world, work) -> what work(ranks of a process) gave in each of them, or its error."""

    def run(world: int, work: Callable[[Distributed], Any]) -> list[Any]:
        net = Connected(world)
        monkeypatch.setattr(ranks, "dist", net)
        found: list[Any] = [None] * world

        def one(rank: int) -> None:
            net.enter(rank)
            try:
                found[rank] = work(Distributed("cpu"))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


VALUES = [None, 3, "ε", [1, {"a": None}], b"", b"\0bytes", "", 0, b"array", "x" * 300]
ARRAYS = [np.arange(6, dtype=np.int64).reshape(2, 3), np.empty(0, np.uint8), np.array(2.5)]


def test_what_the_first_did_is_told_to_all(together: Callable[..., list[Any]]) -> None:
    called: list[int] = []

    def work(mine: Distributed) -> list[Any]:
        return [mine.lead(lambda v=v: (called.append(mine.rank), v)[1]) for v in (*VALUES, *ARRAYS)]

    for found in together(3, work):
        assert found[: len(VALUES)] == VALUES
        for array, expected in zip(found[len(VALUES) :], ARRAYS, strict=True):
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            assert np.array_equal(array, expected)
    assert called == [0] * (len(VALUES) + len(ARRAYS))


def test_nothing_is_unpickled(together: Callable[..., list[Any]]) -> None:
    def work(mine: Distributed) -> Any:
        return mine.lead(lambda: np.array([LedgerError], dtype=object))

    found = together(1, work)[0]
    assert isinstance(found, ValueError)
    assert "allow_pickle" in str(found)


def test_nothing_that_was_pickled_is_read() -> None:
    content = io.BytesIO()
    np.save(content, np.array([LedgerError], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        ranks._unpack(b"array" + content.getvalue())


def test_every_step_has_a_word_of_its_own(together: Callable[..., list[Any]]) -> None:
    """Also the second of two that are called the same: a process that missed one is not taken for one that did not."""

    def work(mine: Distributed) -> list[list[int]]:
        for _ in range(2):
            mine.agree(lambda: b"")
            mine.agree(lambda: b"other")
            mine.lead(lambda: 3)
            mine.total(ARRAYS[0])
            mine.total(ARRAYS[0][:, :1])
        mine.end()
        return list(ranks.dist.words)  # type: ignore[attr-defined]

    (words,) = together(1, work)
    assert together(1, work) == [words]
    assert len({at for _, _, at in words}) == len(words) == 11
    assert {(failure, n) for failure, n, _ in words} == {(0, 0), (0, len(b"other3"))}


def test_what_is_sent_lies_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL sends from GPUs alone; here a device that every machine has, and that holds no numbers."""
    places: list[str] = []

    class Net(Connected):
        def all_gather(self, into: list[Tensor], tensor: Tensor) -> None:
            places.append(tensor.device.type)
            into[:] = [torch.zeros(3, dtype=torch.int64)] * self.world

        def broadcast(self, tensor: Tensor, source: int) -> None:
            places.append(tensor.device.type)
            raise RuntimeError

        def reduce(self, tensor: Tensor, to: int) -> None:
            self.broadcast(tensor, to)

    net = Net(2)
    net.enter(0)
    monkeypatch.setattr(ranks, "dist", net)
    for device in ("cpu", "meta"):
        for step in (lambda mine: mine.lead(lambda: 1), lambda mine: mine.total(ARRAYS[0])):
            with pytest.raises(RanksError):
                step(Distributed(device))
    assert places == ["cpu"] * 4 + ["meta"] * 4


def test_an_exact_sum_is_in_one_place_only(together: Callable[..., list[Any]]) -> None:
    first, *others = together(3, lambda mine: mine.total(np.array([[1, -2], [2**60, mine.rank]])))
    assert first.tolist() == [[3, -6], [3 * 2**60, 3]]
    assert first.dtype == np.int64
    assert [other.shape for other in others] == [(0, 2)] * 2


def test_each_step_belongs_to_one_process(together: Callable[..., list[Any]]) -> None:
    shares = together(3, lambda mine: [*mine.mine(range(0, 40, 4))])
    assert shares == [[0, 12, 24, 36], [4, 16, 28], [8, 20, 32]]
    assert ALONE.mine(range(5)) == range(5)
    assert (ALONE.first, ALONE.rank, ALONE.world) == (True, 0, 1)
    assert ALONE.lead(lambda: 3) == 3
    assert ALONE.total(ARRAYS[0]) is ARRAYS[0]
    assert ALONE.agree(lambda: pytest.fail("one process does not ask")) is None


def other_steps(mine: Distributed) -> None:
    if mine.rank == 1:
        mine.lead(lambda: 1)
    else:
        mine.total(ARRAYS[0])


APART = {
    "other numbers": lambda mine: mine.agree(lambda: b"%d" % (mine.rank == 1)),
    "another step": other_steps,
    "another shape": lambda mine: mine.total(np.zeros(2 + (mine.rank == 2), np.int64)),
    "another type": lambda mine: mine.total(np.zeros(2, np.int64 if mine.rank else np.int32)),
    "one is at the end": lambda mine: mine.end() if mine.rank else mine.agree(lambda: b""),
}


@pytest.mark.parametrize("name", APART)
def test_processes_that_went_apart_stop(name: str, together: Callable[..., list[Any]]) -> None:
    def work(mine: Distributed) -> list[str]:
        mine.agree(lambda: b"the same")
        said = []
        for step in (APART[name], APART[name], lambda mine: mine.lead(lambda: 1)):
            with pytest.raises(RanksError) as caught:
                step(mine)
            said.append(str(caught.value))
        mine.tell(LedgerError("nobody listens any more"))
        return [*said, str(mine.over), str(mine.lost)]

    for first, *later in together(3, work):
        assert "different ways or computed different numbers; nothing was released" in first
        assert later == [LOST, LOST, "True", "False"]


ERRORS = [
    (LedgerError("line 3"), LedgerError, "line 3"),
    (OSError(5, "Input/output error", "disk"), DpdistillError, "disk: Input/output error"),
    (OSError(28, "No space left"), DpdistillError, "input or output: No space left"),
    (OSError("odd"), DpdistillError, "input or output: OSError"),
    (KeyError("label 7 of record 3"), RanksError, "process 1 of this run failed (KeyError)"),
]


@pytest.mark.parametrize(("error", "kind", "text"), ERRORS, ids=lambda x: repr(x)[:20])
def test_an_error_of_one_is_an_error_of_all(
    error: Exception, kind: type[Exception], text: str, together: Callable[..., list[Any]]
) -> None:
    def work(mine: Distributed) -> str:
        if mine.rank == 1:
            mine.tell(error)
        else:
            mine.lead(lambda: 3)
        return "told" if mine.over else "not over"

    assert issubclass(getattr(errors, json.loads(ranks._describe(error, 1))[0]), DpdistillError)  # a name that there is
    first, second, third = together(3, work)
    assert second == "told"
    for found in (first, third):
        assert type(found) is kind
        assert str(found) == text


def test_an_error_that_takes_more_than_a_text_is_still_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(DpdistillError):
        def __init__(self, number: int, text: str) -> None:
            super().__init__(text)

    monkeypatch.setattr(errors, "Other", Other, raising=False)
    for kind in ("Other", "DpdistillError", "nobody", "annotations", "__doc__", "Path"):
        found = ranks._restore(json.dumps([kind, "why"]).encode())
        assert (type(found), str(found)) == (DpdistillError, "why")
    monkeypatch.setattr(errors, "Foreign", ValueError, raising=False)
    assert type(ranks._restore(b'["Foreign", "why"]')) is DpdistillError


def test_a_process_that_is_gone_ends_all(together: Callable[..., list[Any]]) -> None:
    agreed = threading.Barrier(2)

    def work(mine: Distributed) -> list[Any]:
        mine.agree(lambda: b"")
        agreed.wait(10)  # both are out of the exchange
        said = []
        if mine.rank == 1:
            ranks.dist.break_up()  # type: ignore[attr-defined]
        for step in (lambda: mine.lead(lambda: 1), lambda: mine.total(ARRAYS[0]), lambda: mine.agree(lambda: b"")):
            with pytest.raises(RanksError) as caught:
                step()
            said.append(str(caught.value))
        mine.tell(LedgerError("nobody is there"))
        return [*said, mine.lost, mine.over]

    assert together(2, work) == [[LOST, LOST, LOST, True, False]] * 2


def test_a_message_to_a_process_that_is_gone(together: Callable[..., list[Any]]) -> None:
    """The word arrived, and what belongs to it does not."""

    def work(mine: Distributed) -> list[bool]:
        send, net = mine._send, ranks.dist
        mine._send = lambda *facts: (net.break_up(), send(*facts))[1]  # type: ignore[attr-defined, method-assign]
        with pytest.raises(RanksError, match="another process of this run ended"):
            mine.lead(lambda: "a text")
        return [mine.lost]

    assert together(2, work) == [[True]] * 2


def test_after_the_end_nothing_is_exchanged(together: Callable[..., list[Any]]) -> None:
    def work(mine: Distributed) -> bool:
        mine.lead(lambda: 1)
        mine.end()
        assert (mine.over, mine.lost) == (True, False)
        words = len(ranks.dist.words)  # type: ignore[attr-defined]
        mine.tell(LedgerError("too late"))
        assert len(ranks.dist.words) == words  # type: ignore[attr-defined]
        with pytest.raises(
            RanksError, match=r"^another process of this run ended; the same command, .* goes on from here$"
        ):
            mine.agree(lambda: b"")
        return mine.over and not mine.lost

    assert together(2, work) == [True, True]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connected]:
    """As torchrun starts a process: not connected yet."""
    net = Connected(2)
    net.enter(1)
    monkeypatch.setattr(ranks, "dist", net)
    monkeypatch.setattr(ranks, "_connected", False)
    monkeypatch.setattr(ranks.atexit, "register", lambda work: net.calls.append(work))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    yield net
    assert ranks._joined is None


@pytest.mark.parametrize(("name", "value"), [*((name, None) for name in TORCHRUN), ("WORLD_SIZE", "1")])
def test_without_torchrun_it_is_one_process(
    name: str, value: str | None, started: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with ranks.joined() as mine:
        assert mine is ALONE
    with pytest.raises(KeyError), ranks.joined():
        raise KeyError
    assert started.calls == []


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_processes_are_connected_once(
    device: str, backend: str, started: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", places.append)
    for _ in range(2):
        mine = ranks._join(device)
        assert isinstance(mine, Distributed)
        assert (mine.rank, mine.world, mine._device, mine.first) == (1, 2, device, False)
        assert (mine.over, mine.lost) == (False, False)
    assert started.calls == [(backend, timedelta(days=1)), ranks._leave]
    assert places == [0] * (device == "cuda")
    started.calls.clear()
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks._join(device)
    assert places == [0, 3] * (device == "cuda")


def test_the_first_to_leave_waits_for_the_others(started: Connected) -> None:
    ranks._leave()
    assert started.calls == []
    started.calls.append("connected")
    ranks._leave()
    assert started.calls == ["connected", "barrier", "destroyed"]
    ranks._leave()
    assert len(started.calls) == 3
    started.calls.append("connected")
    ranks._leave(in_peace=False)
    assert started.calls[3:] == ["connected", "destroyed"]
    started.calls.append("connected")
    started.barrier = lambda: started.break_up() or started._exchange(torch.zeros(1))  # type: ignore[method-assign, func-returns-value]
    ranks._leave()  # a broken connection is left without a word


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_several_ends_with_all_said(
    code: int, started: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one by itself goes on, to end as any other does."""
    ends: list[Any] = []
    monkeypatch.setattr(ranks.os, "_exit", ends.append)
    monkeypatch.setattr(ranks.sys, "stdout", SimpleNamespace(flush=lambda: ends.append("out")))
    monkeypatch.setattr(ranks.sys, "stderr", SimpleNamespace(flush=lambda: ends.append("err")))
    ranks.end_process(code)
    assert ends == []
    ranks._join("cpu")
    ranks.end_process(code)
    assert started.calls[2:] == ["barrier", "destroyed"]
    assert ends == ["out", "err", code]
    ranks.end_process(code)  # what was left before, for an error, ends so as well
    assert started.calls[4:] == []
    assert ends[3:] == ["out", "err", code]


class Watched(Distributed):
    """Tells what was done with it."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.said: list[Any] = []

    def end(self) -> None:
        self.said.append("end")

    def tell(self, error: Exception) -> None:
        self.said.append(error)


@pytest.mark.parametrize("error", [None, LedgerError("why"), KeyError("x"), KeyboardInterrupt(), "lost"])
def test_they_end_together(error: Any, started: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, devices = Watched(), []
    monkeypatch.setattr(ranks, "_join", lambda device: (devices.append(device), mine)[1])
    started.calls.append("connected")

    def body() -> None:
        with ranks.joined("cuda") as outer, ranks.joined() as inner:
            assert outer is inner is mine
            mine.lost = error == "lost"
            if isinstance(error, BaseException):
                raise error

    if isinstance(error, BaseException):
        with pytest.raises(type(error)) as caught:
            body()
        assert caught.value is error
    else:
        body()
    assert devices == ["cuda"]
    assert mine.said == (
        [error] if isinstance(error, Exception) else ["end"] if not isinstance(error, BaseException) else []
    )
    left = isinstance(error, KeyboardInterrupt) or error == "lost"
    assert started.calls == ["connected", *["destroyed"] * left]
    assert ranks._joined is None
    with ranks.joined():
        assert devices == ["cuda", "cpu"]


CORE = SimpleNamespace(ranks=ranks, private=private, ensemble=ensemble, vault=vault, ledger=ledger, queries=queries)


@pytest.mark.parametrize("world", [1, 3])
def test_threads_release_what_one_does(world: int, together: Callable[..., list[Any]], tmp_path: Path) -> None:
    expected = every_release(Place(CORE, tmp_path / "alone"), ALONE)
    assert together(world, lambda mine: every_release(Place(CORE, tmp_path / "several"), mine)) == [expected] * world
    assert len({(tmp_path / name / "ledger").read_bytes() for name in ("alone", "several")}) == 1
    place = Place(CORE, tmp_path)
    assert together(world, lambda mine: models_of_owners(place, mine)) == [[[3, 2, 2]] * 2] * world


@pytest.mark.parametrize("scenario", [other_numbers, other_records])
def test_other_numbers_or_records_in_one_of_them_stop_all(
    scenario: Callable[[Place, Any], None], together: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for found in together(3, lambda mine: scenario(Place(CORE, tmp_path), mine)):
        assert isinstance(found, RanksError)
        assert "different" in str(found)


def test_what_is_compared_is_every_bit_of_the_made_up_answers() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return x.flatten(1) * (y[:, None] + 1)

    x, y = probe((1, 2, 4), 3)
    assert probed(fn, (1, 2, 4), 3) == fn(x, y).double().numpy().tobytes()
    assert probed(lambda x, y: fn(x, y) * (1 + 2.0**-23), (1, 2, 4), 3) != probed(fn, (1, 2, 4), 3)
