"""Which eigensolver is used where: the choice with a clock of its own, and the real thing where there is CUDA."""

import itertools
import types

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from rmtllmf.channel import _eigen, _water_filling, worst_case, worst_case_rate


class Clock:
    """Stands still unless a solver says that it takes time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Solver:
    """The right answer, with a mark on the first eigenvalue, after `seconds` (all but the first call); or an error."""

    def __init__(self, clock, seconds, *, mark=0.0, first=0.0):
        self.clock, self.seconds, self.mark, self.first = clock, seconds, mark, first
        self.batches, self.error = [], None

    def __call__(self, gram):
        self.clock.now += self.seconds + (self.first if not self.batches else 0.0)
        self.batches.append(len(gram))
        if self.error is not None:
            raise self.error
        v, V = torch.linalg.eigh(gram)
        return v + self.mark, V


def gram(count, size=3, dtype=torch.complex128):
    A = torch.from_numpy(complex_normal(np.random.default_rng(count), count, size, size))
    return (A @ A.mH).to(dtype)


def pair(own, host):
    clock = Clock()
    return clock, Solver(clock, own), Solver(clock, host, mark=1.0)


@pytest.mark.parametrize(("own", "host", "winner"), [(1.0, 2.0, "own"), (2.0, 1.0, "host"), (1.0, 1.0, "own")])
def test_the_faster_one_wins_and_is_remembered(own, host, winner):
    clock, device, cpu = pair(own, host)
    chosen, G = {}, gram(1000)
    mark = float(winner == "host")
    expected = torch.linalg.eigvalsh(G)
    for call in range(3):
        v, V = _eigen.solve(G, device, cpu, chosen, "eigh", clock)
        torch.testing.assert_close(v - mark, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(V * (v - mark)[..., None, :] @ V.mH, G, rtol=1e-12, atol=1e-12)
        assert list(chosen.values()) == [winner]
        runs = {"own": len(device.batches), "host": len(cpu.batches)}
        # a warm-up and two measured runs of each, once; and one run of the winner a call
        assert runs == {"own": 3, "host": 3} | {winner: 4 + call}


def test_the_first_run_does_not_count():
    """A device compiles and allocates there."""
    clock = Clock()
    device, cpu = Solver(clock, 1.0, first=100.0), Solver(clock, 2.0)
    chosen = {}
    _eigen.solve(gram(300), device, cpu, chosen, "eigh", clock)
    assert list(chosen.values()) == ["own"]


def test_small_batches_stay_on_the_device_unmeasured():
    clock, device, cpu = pair(9.0, 1.0)
    chosen = {}
    for batch in (gram(255), gram(1)[0], gram(1)[:0], gram(12).view(3, 4, 3, 3)):
        v, V = _eigen.solve(batch, device, cpu, chosen, "eigh", clock)
        assert v.shape == batch.shape[:-1]
        assert V.shape == batch.shape
    assert (chosen, cpu.batches) == ({}, [])
    _eigen.solve(gram(256).view(2, 128, 3, 3), device, cpu, chosen, "eigh", clock)
    assert list(chosen.values()) == ["host"]


def test_kinds_are_measured_one_by_one():
    clock, device, cpu = pair(1.0, 2.0)
    chosen = {}
    batches = [gram(300), gram(300, size=4), gram(300, dtype=torch.complex64), gram(3000)]
    for batch, name in itertools.product(batches, ["eigh", "eigvalsh"]):
        _eigen.solve(batch, device, cpu, chosen, name, clock)
    assert len(chosen) == 8
    done = len(cpu.batches)
    device.seconds = 5.0  # too late
    for count in (300, 510, 3000, 100_000):
        _eigen.solve(gram(1, size=3).expand(count, 3, 3), device, cpu, chosen, "eigh", clock)
    assert (len(chosen), len(cpu.batches)) == (8, done)


@pytest.mark.parametrize(("size", "most"), [(1, 2048), (8, 2048), (32, 1024), (48, 455), (100, 256)])
def test_samples_are_bounded(size, most):
    clock, device, cpu = pair(1.0, 2.0)
    batch = torch.eye(size, dtype=torch.complex128).expand(most + 10, size, size)
    _eigen.solve(batch, device, cpu, {}, "eigh", clock)
    assert device.batches == [most] * 3 + [most + 10]
    assert cpu.batches == [most] * 3


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError("no convergence"), RuntimeError("cusolver"), NotImplementedError("no kernel")]
)
@pytest.mark.parametrize("count", [10, 1000])
def test_where_the_device_fails_the_host_takes_over_for_that_call(error, count):
    clock, device, cpu = pair(1.0, 2.0)
    chosen, G = {}, gram(count)
    device.error = error
    v, _ = _eigen.solve(G, device, cpu, chosen, "eigh", clock)
    torch.testing.assert_close(v, torch.linalg.eigvalsh(G) + 1.0)
    assert chosen == {}  # nothing is concluded from it
    device.error = None
    v, _ = _eigen.solve(G, device, cpu, chosen, "eigh", clock)
    torch.testing.assert_close(v, torch.linalg.eigvalsh(G))
    device.error = error
    before = dict(chosen)
    v, _ = _eigen.solve(G, device, cpu, chosen, "eigh", clock)
    torch.testing.assert_close(v, torch.linalg.eigvalsh(G) + 1.0)
    assert chosen == before


@pytest.mark.parametrize("count", [10, 1000])
def test_out_of_memory_and_mistakes_are_no_reason_to_fall_back(count):
    clock, device, cpu = pair(1.0, 2.0)
    for error in (torch.cuda.OutOfMemoryError("no more"), TypeError("wrong")):
        device.error = error
        with pytest.raises(type(error)):
            _eigen.solve(gram(count), device, cpu, {}, "eigh", clock)
    assert cpu.batches == []
    cpu.error = device.error = torch.linalg.LinAlgError("both")
    with pytest.raises(torch.linalg.LinAlgError, match="both"):
        _eigen.solve(gram(count), device, cpu, {}, "eigh", clock)


def test_on_the_cpu_it_is_torch_and_nothing_else(monkeypatch):
    monkeypatch.setattr(_eigen, "solve", None)
    G = gram(300)
    for ours, theirs in zip(_eigen.eigh(G), torch.linalg.eigh(G), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(_eigen.eigvalsh(G), torch.linalg.eigvalsh(G), rtol=0, atol=0)


@pytest.mark.parametrize("winner", ["own", "host"])
def test_the_worst_case_uses_what_was_chosen(monkeypatch, winner):
    """The real candidates, the host's with its copies, with a clock that decides for one of them."""
    H = torch.from_numpy(complex_normal(np.random.default_rng(0), 500, 5, 3))
    expected, rate = worst_case(H, 1.0, 2.0, noise=0.1), worst_case_rate(H, 1.0, 2.0, noise=0.1)
    chosen, used = {}, []

    def counted(name, solver):
        return lambda G: (used.append(name), solver(G))[1]

    def through(function, own):
        # `own`, `host`, `own`, `host`: the clock is read before and after each
        ticks = itertools.cycle([0, 1, 0, 2] if winner == "own" else [0, 2, 0, 1])
        ways = counted("own", own), counted("host", _eigen._through_host(own))
        return lambda G: _eigen.solve(G, *ways, chosen, function, lambda: next(ticks))

    monkeypatch.setattr(_water_filling, "eigh", through("eigh", torch.linalg.eigh))
    eigenvalues = through("eigvalsh", lambda G: (torch.linalg.eigvalsh(G),))
    monkeypatch.setattr(_water_filling, "eigvalsh", lambda G: eigenvalues(G)[0])
    found = worst_case(H, 1.0, 2.0, noise=0.1)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=0)
    torch.testing.assert_close(worst_case_rate(H, 1.0, 2.0, noise=0.1), rate, rtol=0, atol=0)
    assert set(chosen.values()) == {winner}
    assert [name for name, _, size, _, _ in chosen] == ["eigh", "eigvalsh"]
    assert used[6] == used[-1] == winner


class HostTransfers(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes of what goes from a device to the host, single numbers aside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device.type != "cpu" and result.device.type == "cpu" and source.numel() > 1:
                self.shapes.append(tuple(source.shape))
        return result


@pytest.fixture
def solvers(monkeypatch):
    """Force one of the two, or leave the choice to the measurement (None)."""
    forced = types.SimpleNamespace(choice=None)
    monkeypatch.setattr(_eigen, "_chosen", {})
    measured = _eigen.faster
    monkeypatch.setattr(_eigen, "faster", lambda ways, clock: forced.choice or measured(ways, clock))
    return forced


GPU_CASES = {
    "small, n = 8": (20, 16, 8),
    "large, n = 8": (3000, 16, 8),
    "chunks, n = 2": (20_000, 4, 2),
    "small, n = 48": (5, 64, 48),
    "large, n = 48": (300, 64, 48),
    "large, wide": (300, 4, 6),
}


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["own", "host", None])
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_on_cuda_as_on_the_cpu(solvers, case, choice):
    solvers.choice = choice
    rng = np.random.default_rng(1)
    H = torch.from_numpy(complex_normal(rng, *case))
    P_N = torch.from_numpy(rng.uniform(0.5, 2.0, case[0]))
    expected = worst_case(H, 0.7, P_N, noise=0.1)
    with HostTransfers() as transfers:
        found = worst_case(H.cuda(), 0.7, P_N.cuda(), noise=0.1)
        rate = worst_case_rate(H.cuda(), 0.7, P_N.cuda(), noise=0.1)
    for part in (found.covariance, found.sum_rate, found.level, rate):
        assert part.device.type == "cuda"
    if choice == "own" or case[0] < _eigen.LARGE:
        assert transfers.shapes == []
    if choice == "host" and case[0] >= _eigen.LARGE:
        assert transfers.shapes  # or the test above would see nothing
    C = expected.covariance
    off = (found.covariance.cpu() - C).abs().amax((-2, -1)) / C.abs().amax((-2, -1))
    assert float(off.max()) < 1e-9
    for ours, theirs in ((found.sum_rate, expected.sum_rate), (found.level, expected.level), (rate, expected.sum_rate)):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["own", "host"])
@pytest.mark.parametrize("case", [(20, 6, 4), (400, 6, 4)], ids=["small", "large"])
def test_gradients_on_cuda_as_on_the_cpu(solvers, case, choice):
    solvers.choice = choice
    rng = np.random.default_rng(2)
    values = [complex_normal(rng, *case), *(rng.uniform(0.5, 2.0, s) for s in [(case[0], case[2]), case[0], case[0]])]
    weight = torch.from_numpy(complex_normal(rng, case[0], case[1], case[1]))
    gradients = {}
    for device in ("cpu", "cuda"):
        H, P, P_N, noise = (torch.from_numpy(value).to(device).requires_grad_() for value in values)
        found = worst_case(H, P, P_N, noise=noise)
        loss = (found.covariance * weight.to(device)).real.sum() + found.sum_rate.sum() + found.level.square().sum()
        gradients[device] = torch.autograd.grad(loss, (H, P, P_N, noise))
    for ours, theirs in zip(gradients["cuda"], gradients["cpu"], strict=True):
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("draws", [1, 300, 20_000])
def test_out_on_cuda(draws):
    H = torch.from_numpy(complex_normal(np.random.default_rng(3), draws, 4, 2)).cuda()
    out = torch.empty(draws, 4, 4, dtype=torch.complex128, device="cuda")
    expected = worst_case(H, 1.0, 2.0, noise=0.1).covariance
    assert worst_case(H, 1.0, 2.0, noise=0.1, out=out).covariance is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    strided = torch.empty(draws, 4, 8, dtype=torch.complex128, device="cuda")[..., ::2]
    torch.testing.assert_close(worst_case(H, 1.0, 2.0, noise=0.1, out=strided).covariance, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_the_choice_on_cuda_is_one_of_the_two_and_kept(solvers):
    G = gram(3000, size=8).cuda()
    expected = torch.linalg.eigvalsh(G.cpu())
    for _ in range(2):
        for v in (_eigen.eigh(G)[0], _eigen.eigvalsh(G)):
            assert v.device.type == "cuda"
            torch.testing.assert_close(v.cpu(), expected, rtol=1e-9, atol=1e-12)
    assert sorted(name for name, *_ in _eigen._chosen) == ["eigh", "eigvalsh"]
    assert set(_eigen._chosen.values()) <= {"own", "host"}
