"""What is taken from Sionna, checked against closed forms, and that Sionna does no harm. Skipped without Sionna."""

import doctest
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import rmtllmf.channel.sionna as wrapper
from helpers.oracles import complex_normal
from rmtllmf.channel import (
    LdpcCode,
    UplinkScenario,
    ldpc_decode,
    ldpc_encode,
    los_probability,
    rma,
    sionna_uplink,
    steering_vector,
    transmit_symbols,
    uma,
    umi,
)
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.metrics import snr_db

needs_sionna = pytest.mark.skipif(find_spec("sionna") is None, reason="needs the extra sionna")
MODELS = {"uma": uma, "umi": umi, "rma": rma}
ROOT = Path(__file__).resolve().parents[2]


def run(code, *, path=()):
    """The last line that `code` prints in a fresh interpreter, as JSON."""
    search = os.pathsep.join(filter(None, [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_sionna_the_error_says_what_to_install(tmp_path):
    """A package that cannot be imported stands for one that is not there."""
    (tmp_path / "sionna").mkdir()
    (tmp_path / "sionna" / "__init__.py").write_text("raise ModuleNotFoundError('No module named sionna')")
    code = """
import json, torch
from rmtllmf.channel import ldpc_decode, ldpc_encode, sionna_uplink
said = []
for call in (lambda: sionna_uplink("umi", seed=0), lambda: ldpc_encode(torch.ones(20), 40),
             lambda: ldpc_decode(torch.ones(40), 20)):
    try:
        call()
    except ImportError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    said = run(code, path=[tmp_path])
    assert len(said) == 3
    assert all("pip install 'rmtllmf[sionna]'" in text and "No module named sionna" in text for text in said)


@needs_sionna
def test_importing_it_reseeds_nothing():
    """In a fresh interpreter, where the first call imports Sionna, which reseeds torch's global generator."""
    code = """
import json, sys, torch, random, numpy as np
from rmtllmf.channel import sionna_uplink
torch.manual_seed(0), np.random.seed(0), random.seed(0)
before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_default_dtype()
assert "sionna" not in sys.modules
H = sionna_uplink("umi", seed=0).H
assert "sionna.phy" in sys.modules
same = [torch.equal(before[0], torch.get_rng_state()), before[1] == np.random.get_state()[1].tolist(),
        before[2] == random.getstate(), before[3] == torch.get_default_dtype()]
print(json.dumps([same, [H[3, 2].real.item(), H[3, 2].imag.item()]]))
"""
    same, value = run(code)
    assert same == [True] * 4
    assert complex(*value) == complex(sionna_uplink("umi", seed=0).H[3, 2])  # and there is nothing random about it


@needs_sionna
def test_neither_torchs_nor_sionnas_globals_matter_or_change():
    from sionna.phy import config

    expected = sionna_uplink("uma", 2, seed=0).H
    precision, seed = config.precision, config.seed
    try:
        config.precision = "double"
        config.seed = 7
        torch.manual_seed(11)
        own, torchs = config.torch_rng("cpu").get_state(), torch.get_rng_state()
        numpys = config.np_rng.bit_generator.state
        assert torch.equal(sionna_uplink("uma", 2, seed=0).H, expected)
        ldpc_decode(1.0 - 2.0 * ldpc_encode(torch.ones(20), 40), 20)
        assert torch.equal(config.torch_rng("cpu").get_state(), own)
        assert torch.equal(torch.get_rng_state(), torchs)
        assert config.np_rng.bit_generator.state == numpys
        assert (config.precision, config.seed) == ("double", 7)
    finally:
        config.precision, config.seed = precision, seed


@needs_sionna
def test_after_an_error_too():
    before = torch.get_rng_state()
    with pytest.raises(InputError, match="k, n: there is no 5G LDPC code with k = 3, n = 40"):
        ldpc_encode(torch.ones(3), 40)
    assert torch.equal(torch.get_rng_state(), before)


@needs_sionna
@pytest.mark.parametrize("los", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_our_path_loss_is_sionnas(model, los):
    """Formula against formula; with Sionna's other speed of light the breakpoint is elsewhere, worth some .006 dB."""
    near, far = (20.0, 4900.0)
    d = np.geomspace(near, far, 40)
    cell = UplinkScenario(num_users=40, num_antennas=1, placement=d, carrier=3.5e9)
    channel = wrapper._model(model, cell, path_loss=True, shadowing=False)
    users = torch.stack([torch.from_numpy(d), torch.zeros(40), torch.full((40,), 1.5)], -1)[None].double()
    wrapper._responses(channel, users, {"uma": 25.0, "umi": 10.0, "rma": 35.0}[model], los, 0.0, torch.Generator())
    theirs = channel._scenario.basic_pathloss[0, 0].numpy()
    ours = -10 * np.log10(MODELS[model](d, 3.5e9, los=los))
    slack = 20 * math.log10(3e8 / 299792458)
    np.testing.assert_allclose(ours, theirs, atol=slack + 1e-9, rtol=0)
    if not los:  # the standard's blocked formula has no breakpoint
        np.testing.assert_allclose(ours[d < 3000], theirs[d < 3000], atol=1e-9, rtol=0)
    chance = channel._scenario.los_probability[0, 0].numpy()
    np.testing.assert_allclose(los_probability(d, model), chance, rtol=1e-9)


@needs_sionna
@pytest.mark.parametrize("model", MODELS)
def test_the_mean_power_is_that_of_the_path_loss(model):
    """Clusters, rays and polarisation only share the power out, on average."""
    cell = UplinkScenario(num_users=1, placement=[300.0])
    h = sionna_uplink(model, 400, seed=0, cell=cell, los=False, shadowing=False).H[..., 0]
    power = h.abs().square().mean(-1) / MODELS[model](300.0, 2.4e9, los=False).item()
    assert power.mean() == pytest.approx(1, abs=4 * float(power.std()) / math.sqrt(400))
    h = sionna_uplink(model, 400, seed=0, cell=cell, los=False, shadowing=False, path_loss=False).H[..., 0]
    power = h.abs().square().mean(-1)
    assert power.mean() == pytest.approx(1, abs=4 * float(power.std()) / math.sqrt(400))


@needs_sionna
def test_line_of_sight_comes_from_where_the_user_is():
    """Same geometry as UplinkScenario's: the array along y, broadside along x."""
    place = (100.0, 60.0)
    cell = UplinkScenario(num_users=1, placement=[place])
    h = sionna_uplink("umi", 50, seed=0, cell=cell, los=True).H[..., 0]
    share = []
    for sign in (1, -1):
        a = steering_vector(torch.tensor(sign * math.atan2(place[1], place[0]), dtype=torch.float64), 16)
        share.append(((h @ a.conj()).abs().square() / 16 / h.abs().square().sum(-1)).mean())
    assert share[0] > 0.7 > 0.1 > share[1]


@needs_sionna
def test_subcarriers():
    cell = UplinkScenario(num_users=2, placement=[300.0, 500.0])
    middle, near, far = (sionna_uplink("umi", seed=0, cell=cell, offset=f).H for f in (0.0, 1e3, 2e7))
    assert (middle - near).norm() < 0.02 * middle.norm()
    assert (middle - far).norm() > 0.3 * middle.norm()


@needs_sionna
def test_batches_dtypes_and_prefixes():
    up = sionna_uplink("rma", 3, 2, seed=0, numpy=True)
    assert up.H.shape == (3, 2, 16, 8)
    assert up.P.shape == (3, 2, 8)
    assert up.noise.shape == (3, 2)
    single = sionna_uplink("rma", 3, 2, seed=0, dtype=torch.complex64)
    np.testing.assert_array_equal(single.H.numpy(), up.H.astype(np.complex64))
    assert single.P.dtype == torch.float32
    assert sionna_uplink("rma", seed=0).H.shape == (16, 8)
    assert sionna_uplink("rma", 0, seed=0).H.shape == (0, 16, 8)
    assert not torch.equal(sionna_uplink("rma", seed=0).H, sionna_uplink("rma", seed=1).H)
    # draws beyond the first chunk are no copies of it
    many = sionna_uplink("rma", wrapper._CHUNK + 1, seed=0).H
    assert not torch.equal(many[0], many[-1])
    assert many.abs().min() > 0


@needs_sionna
def test_garbage_is_not_handed_on(monkeypatch):
    cell = UplinkScenario(num_users=1)
    channel = wrapper._model("umi", cell, path_loss=True, shadowing=True)
    monkeypatch.setattr(
        type(channel),
        "__call__",
        lambda *_: (torch.full((1, 1, 16, 1, 1, 3, 1), complex("nan")), torch.zeros(1, 1, 1, 3)),
    )
    with pytest.raises(NonFiniteError, match="Sionna returned NaN"):
        sionna_uplink("umi", seed=0, cell=cell)


@needs_sionna
@pytest.mark.parametrize(("k", "n"), [(100, 200), (500, 600), (1000, 4000)])
def test_ldpc_corrects_what_it_should(k, n):
    """Without errors at the Shannon limit plus 3 dB, and far from it, worse than half below the limit minus 1 dB."""
    source = torch.Generator().manual_seed(0)
    bits = torch.randint(2, (20, k), generator=source)
    coded = ldpc_encode(bits, n)
    assert coded.shape == (20, n)
    assert coded.dtype == torch.int64
    np.testing.assert_array_equal(ldpc_encode(bits.numpy(), n), coded)
    assert torch.equal(ldpc_encode(bits.view(4, 5, k), n), coded.view(4, 5, n))

    def block_errors(snr):
        noise = 1 / snr
        y = 1.0 - 2.0 * coded + noise**0.5 * torch.randn(coded.shape, generator=source)
        return (ldpc_decode(2 * y / noise, k) != bits).any(-1).double().mean()

    limit = 4 ** (k / n) - 1  # real Gaussian inputs: 1/2 log2(1 + snr) = k/n
    assert block_errors(10 ** (0.3 + 0.1 * (k / n > 0.7)) * limit) == 0
    assert block_errors(10**-0.1 * limit) > 0.5


@needs_sionna
def test_ldpc_is_linear():
    """The code of a sum (mod 2) is the sum of the codes: no bits out of order."""
    bits = torch.randint(2, (2, 50), generator=torch.Generator().manual_seed(0))
    a, b = ldpc_encode(bits, 120)
    assert torch.equal(ldpc_encode(bits[0] ^ bits[1], 120), a ^ b)


@needs_sionna
@pytest.mark.parametrize("name", ["sionna_uplink", "ldpc_encode", "ldpc_decode"])
def test_the_examples_run(name):
    """They are skipped where docstrings are tested without Sionna."""
    text = getattr(wrapper, name).__doc__.replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, dict(vars(wrapper)), name, None, 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@needs_sionna
@pytest.mark.parametrize("cancellation", ["genie", "real"])
def test_ldpc_around_the_symbol_link(cancellation):
    """Rate 1/2 at an SINR where a tenth of the symbols is wrong: uncoded it fails, coded only quantisation is left."""
    rng = np.random.default_rng(0)
    H = np.diag([1.0, 1.3]) + 0.1 * complex_normal(rng, 2, 2)
    sent = [{"w": torch.randn(30_001, generator=torch.Generator().manual_seed(q))} for q in range(2)]
    options = {"seed": 1, "modulation": 4, "bits": 8, "cancellation": cancellation}
    uncoded = transmit_symbols(sent, H, 1.0, 0.3 * np.eye(2), **options)
    coded = transmit_symbols(sent, H, 1.0, 0.3 * np.eye(2), code=LdpcCode(k=500, n=1000), **options)
    clean = transmit_symbols(sent, H, 1.0, 1e-9 * np.eye(2), **options)
    for q in range(2):
        assert snr_db(sent[q], uncoded[q]) < 15
        assert torch.equal(coded[q]["w"], clean[q]["w"])
        assert snr_db(sent[q], coded[q]) > 35


@needs_sionna
def test_an_ldpc_code_beyond_capacity_fails():
    """No code of rate 1/2 helps where 4-QAM carries less than one bit a symbol."""
    sent = [{"w": torch.randn(20_000, generator=torch.Generator().manual_seed(0))}]
    H, noise = np.ones((1, 1)) + 0j, 10**0.3 * np.eye(1)
    (got,) = transmit_symbols(sent, H, 1.0, noise, seed=0, modulation=4, code=LdpcCode(k=500, n=1000))
    assert snr_db(sent[0], got) < 5
