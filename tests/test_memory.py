"""Parts that visit a device: order, bytes, and who is there when."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError
from mrflow.models.cuda_graphs import CudaGraph, GraphPool
from mrflow.models.offload import (
    BlockOffloader,
    Ledger,
    OffloadManager,
    Phase,
    RuntimeOptions,
    WeightGroup,
    check_offload,
)
from mrflow.tiling import in_tiles, ramp, starts

CPU = torch.device("cpu")


def line(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(w, w, bias=False) for w in widths))


def test_an_offloader_holds_two_neighbours() -> None:
    net, ledger = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5))), Ledger()
    offloader = BlockOffloader([(m, WeightGroup([m], CPU, ledger)) for m in net], CPU)
    there: list[int] = []
    for m in net:
        m.register_forward_hook(lambda *_: there.append(ledger.now))
    want = net(torch.ones(1, 4))
    assert ledger.peak == 2 * 64 and ledger.now == 0
    assert max(there) <= 2 * 64
    assert torch.equal(net(torch.ones(1, 4)), want)
    offloader.clear()
    assert ledger.now == 0


def test_an_offloader_is_empty_after_an_error_is_cleared() -> None:
    net, ledger = line(4, 4, 4), Ledger()
    offloader = BlockOffloader([(m, WeightGroup([m], CPU, ledger)) for m in net], CPU)
    with pytest.raises(RuntimeError):
        net(torch.ones(1, 5))
    assert ledger.now > 0
    offloader.clear()
    assert ledger.now == 0


def test_phases_take_turns() -> None:
    a, b, ledger = line(8), line(4, 4), Ledger()
    residency = OffloadManager(
        {"a": Phase([WeightGroup([a], CPU, ledger)]), "b": Phase([WeightGroup([b], CPU, ledger)])}, moving=True
    )
    assert ledger.now == 0
    with residency.using("a"):
        assert ledger.now == 8 * 8 * 4
    with residency.using("b"):
        assert ledger.now == 2 * 4 * 4 * 4
    assert ledger.peak == 8 * 8 * 4
    OffloadManager({"a": Phase([WeightGroup([a], CPU, ledger)])}, moving=False)
    assert ledger.now == 2 * 4 * 4 * 4 + 8 * 8 * 4


def test_parts_share_nothing_that_is_left_out_and_count_tied_tensors_once() -> None:
    net, ledger = line(4, 4), Ledger()
    net[1].weight = net[0].weight
    assert WeightGroup([net], CPU, ledger).bytes == 64
    assert WeightGroup([line(4, 4)], CPU, ledger, without=[]).bytes == 128
    other = line(4, 4)
    assert WeightGroup([other], CPU, ledger, without=[other[0]]).bytes == 64


def test_one_thread_at_a_time_uses_what_moves() -> None:
    a, b, ledger = line(8), line(8), Ledger()
    residency = OffloadManager(
        {"a": Phase([WeightGroup([a], CPU, ledger)]), "b": Phase([WeightGroup([b], CPU, ledger)])}, moving=True
    )
    wrong: list[int] = []

    def work(name: str) -> None:
        for _ in range(200):
            with residency.using(name):
                if ledger.now != 256:
                    wrong.append(ledger.now)

    threads = [threading.Thread(target=work, args=(n,)) for n in ("a", "b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_ways_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(PlanError, match="none, phase, block"):
        check_offload("disk")
    with pytest.raises(PlanError, match="compile"):
        RuntimeOptions("block", compile=True)
    with pytest.raises(PlanError, match="multiple of 8"):
        RuntimeOptions(tile=20)


class Recorder:
    """Stands in for CUDA: a replay computes again from the recorded inputs, or from what it is told."""

    def __init__(self, *, wrong: bool = False, fails: bool = False) -> None:
        self.captures = self.replays = 0
        self.wrong, self.fails = wrong, fails

    def __call__(self, f: object, inputs: tuple[Tensor, ...]) -> object:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captures += 1
        output = f(*inputs)  # type: ignore[operator]

        def replay() -> None:
            self.replays += 1
            output.copy_(f(*inputs) + (1 if self.wrong else 0))  # type: ignore[operator]

        return replay, output


def test_a_shape_is_recorded_at_its_second_call_and_replayed_from_then_on() -> None:
    calls, recorder = [], Recorder()
    step = CudaGraph(lambda x, y, key=None: calls.append(1) or x * 2 + y, GraphPool(capture=recorder))  # type: ignore[func-returns-value]
    for i in range(4):
        x, y = torch.full((2,), float(i)), torch.full((2,), 10.0 * i)
        assert torch.equal(step(x, y), x * 2 + y)
        assert (recorder.captures, recorder.replays) == ((0, 0), (1, 1), (1, 2), (1, 3))[i], i
    step(torch.ones(3), torch.ones(3))
    step(torch.ones(2), torch.ones(2), key="other")
    assert recorder.captures == 1


def test_what_is_recorded_knows_its_key() -> None:
    """Called for itself, recorded and replayed alike: it says more than shapes do."""
    step = CudaGraph(lambda x, key=0: x * key, GraphPool(capture=Recorder()))
    for times in range(4):
        for key in (2, 3):
            x = torch.full((2,), 1.0 + times)
            assert torch.equal(step(x, key=key), x * key)


def test_what_a_replay_gives_is_not_overwritten_by_the_next() -> None:
    step = CudaGraph(lambda x: x + 1, GraphPool(capture=Recorder()))
    first = [step(torch.full((2,), float(i))) for i in range(4)]
    assert [float(t[0]) for t in first] == [1, 2, 3, 4]


@pytest.mark.parametrize(("broken", "words"), [("wrong", "did not give"), ("fails", "not permitted when stream")])
def test_a_graph_that_fails_or_lies_is_not_used(broken: str, words: str) -> None:
    step = CudaGraph(lambda x: x * 2, GraphPool(capture=Recorder(wrong=broken == "wrong", fails=broken == "fails")))
    with collect_notes() as notes:
        for i in range(4):
            assert torch.equal(step(torch.full((2,), float(i))), torch.full((2,), 2.0 * i))
    assert len(notes) == 1 and words in notes[0]


def test_the_graph_that_was_longest_unused_is_dropped() -> None:
    """A sweep over lengths of prompts: what comes back is recorded again, what is used stays; a pool is all runs'."""
    recorder = Recorder()
    pool = GraphPool(most=2, capture=recorder)
    step, other = CudaGraph(lambda x: x * 3, pool), CudaGraph(lambda x: x - 1, pool)

    def call(which: CudaGraph, size: int, times: int = 1) -> int:
        for _ in range(times):
            x = torch.arange(float(size))
            assert torch.equal(which(x), which.f(x))
        return recorder.captures

    assert call(step, 1, 3) == 1 and call(step, 2, 3) == 2 and len(pool.kept) == 2
    assert call(step, 1) == 2  # used: the other is older now
    assert call(other, 1, 2) == 3 and len(pool.kept) == 2
    assert len(step.recorded) == len(other.recorded) == 1
    assert call(step, 1, 5) == 3  # it was kept
    assert call(step, 2) == 3 and call(step, 2) == 4  # it was not: first itself, then recorded again
    assert len(step.recorded) == 2 and not other.recorded


def test_graphs_that_fail_count_for_nothing() -> None:
    pool = GraphPool(most=1, capture=Recorder(fails=True))
    step = CudaGraph(lambda x: x * 2, pool)
    with collect_notes():
        for size in (1, 2, 1, 2, 1):
            step(torch.ones(size))
    assert not pool.kept and list(step.recorded.values()) == [None, None]


@given(st.integers(1, 300), st.integers(2, 8), st.integers(0, 7), st.sampled_from([1, 2, 4]))
def test_tiles_cover_every_cell(side: int, tile: int, overlap: int, step: int) -> None:
    side, tile, overlap = side * step, tile * step, min(overlap, tile - 1) * step
    begins = starts(side, tile, overlap, step)
    covered = torch.zeros(side)
    for begin in begins:
        assert begin % step == 0
        covered[begin : begin + tile] += 1
    assert bool((covered > 0).all()) and begins[-1] + tile >= side
    assert len(begins) == len(set(begins))


@given(st.integers(5, 60), st.integers(5, 60), st.sampled_from([10, 12, 16]), st.sampled_from([3, 6, 9]))
def test_tiled_is_whole_where_the_network_reaches_a_third_of_the_overlap(h: int, w: int, tile: int, over: int) -> None:
    torch.manual_seed(h * w)
    conv = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(over // 3)))
    x = torch.randn(2, 2, h, w)

    def f(part: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(conv(part), scale_factor=2)

    with torch.no_grad():
        assert torch.allclose(in_tiles(f, x, tile=tile, overlap=over, up=2), f(x), atol=1e-5)
        if max(h, w) > tile:  # one cell more, and a tile's own border shows
            wider = nn.Sequential(conv, nn.Conv2d(2, 2, 3, padding=1))
            assert not torch.allclose(in_tiles(wider, x, tile=tile, overlap=over), wider(x), atol=1e-5)


def test_tiles_go_down_too() -> None:
    x = torch.randn(1, 1, 40, 24)
    pool = nn.AvgPool2d(4)
    assert torch.allclose(in_tiles(pool, x, tile=16, overlap=8, down=4), pool(x), atol=1e-6)
    with pytest.raises(PlanError, match="multiples of 4"):
        in_tiles(pool, x, tile=18, overlap=8, down=4)


def test_a_ramp_is_one_at_a_true_border() -> None:
    w = ramp(6, 2, 0, first=True, last=False, like=torch.ones(1))
    assert torch.allclose(w, torch.tensor([1, 1, 1, 1, 2 / 3, 1 / 3]))
    w = ramp(8, 6, 2, first=False, last=True, like=w)
    assert torch.allclose(w, torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1]))
    w = ramp(6, 2, 0, first=True, last=False, like=w)
    assert torch.allclose(ramp(6, 2, 0, first=False, last=True, like=w), w.flip(0))
