"""The disturbance test in forward mode: its variance is chi-squared about the exact one, its level is alpha."""

import math

import pytest
import torch
from open_clip.transformer import VisionTransformer
from scipy.stats import binom, chi2, kstest, norm, t
from torch import nn

from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.metrics import disturbance_test


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def mlp():
    return built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double())


def jvp(model, tolerated, x, *, tangents=4, seed=0, **options):
    return disturbance_test(model, model, model, tolerated, x, method="jvp", tangents=tangents, seed=seed, **options)


VARIANCES = {"0.weight": 1e-4, "2.weight": 0.0, "2.bias": gaussian(6).square(), "3.weight": 5e-4, "3.bias": 1e-3}


def near(found, exact):
    """Within 5 standard errors of the estimated variance, on the scale that its logarithm is about normal on."""
    error = (found.sd.square() / exact.sd.square() - 1).abs().max()
    return float(error) < 5 * found.variance_error


def test_many_draws_are_chi_squared_about_the_exact_variance():
    """K sd^2 / exact^2 ~ chi2_K at every input and logit; Kolmogorov-Smirnov over seeds, p > 1e-4 each."""
    model, x, seeds = mlp(), gaussian(3, 4, seed=9), range(120)
    exact = disturbance_test(model, model, model, VARIANCES, x).sd
    ratios = torch.stack([4 * (jvp(model, VARIANCES, x, seed=seed).sd / exact).square() for seed in seeds])
    assert ratios.shape == (120, 3, 3)
    for column in ratios.flatten(1).T:
        assert kstest(column.numpy(), chi2(4).cdf).pvalue > 1e-4
        assert float(column.mean()) == pytest.approx(4, abs=5 * math.sqrt(8 / 120))


def test_the_stated_error_is_that_of_the_variance():
    model, x = mlp(), gaussian(2, 4, seed=3)
    exact = disturbance_test(model, model, model, 1e-3, x)
    assert (exact.degrees, exact.variance_error) == (math.inf, 0.0)
    found = jvp(model, 1e-3, x, tangents=800)
    assert (found.degrees, found.variance_error) == (800, 0.05)
    assert near(found, exact)
    few = jvp(model, 1e-3, x, tangents=3, alpha=0.01)
    torch.testing.assert_close(few.threshold, t.isf(0.005, 3) * few.sd)


LOGITS, DRAWS, ALPHA = 1000, 4, 0.05


def test_the_level_of_a_linear_model_is_alpha_with_students_quantile_only():
    """Logits with weights of their own are independent, so counts are binomial: intervals of probability 1 - 1e-6."""
    model, tolerated = nn.Linear(6, LOGITS), {"weight": 0.04, "bias": 0.01}
    before = {name: gaussian(*v.shape, seed=1, dtype=torch.float32) for name, v in model.state_dict().items()}
    student = normal = 0
    for draw in range(DRAWS):
        after = {
            name: v + tolerated[name] ** 0.5 * gaussian(*v.shape, seed=10 * draw + k + 7, dtype=torch.float32)
            for k, (name, v) in enumerate(before.items())
        }
        x = gaussian(1, 6, seed=1000 * draw, dtype=torch.float32)
        found = disturbance_test(model, before, after, tolerated, x, method="jvp", seed=draw, alpha=ALPHA)
        student += int(found.rejected.sum())
        normal += int((found.statistic > norm.isf(ALPHA / 2) * found.sd).sum())
    wrong = 2 * t.sf(norm.isf(ALPHA / 2), 4)
    assert wrong == pytest.approx(0.12, abs=0.005)
    for count, expected in ((student, ALPHA), (normal, wrong)):
        low, high = binom.interval(1 - 1e-6, LOGITS * DRAWS, expected)
        assert low <= count <= high


def test_the_same_seed_gives_the_same_bits_in_any_order_of_names():
    model, x = mlp(), gaussian(5, 4, seed=2)
    first = jvp(model, VARIANCES, x).sd
    assert torch.equal(first, jvp(model, dict(reversed(VARIANCES.items())), x).sd)
    shuffled = {name: model.state_dict()[name] for name in reversed(model.state_dict())}
    other = disturbance_test(model, shuffled, model, VARIANCES, x, method="jvp", seed=0)
    assert torch.equal(first, other.sd)
    assert not torch.equal(first, jvp(model, VARIANCES, x, seed=1).sd)
    source = torch.Generator().manual_seed(3)
    assert not torch.equal(jvp(model, VARIANCES, x, seed=source).sd, jvp(model, VARIANCES, x, seed=source).sd)
    # other inputs beside it play no part
    torch.testing.assert_close(first[3:4], jvp(model, VARIANCES, x[3:4]).sd)


def test_tangents_of_equal_shapes_are_independent():
    """Two weights that are added: with one tangent for both the variance would be twice as large."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (nn.Parameter(torch.ones(50)) for _ in range(2))

        def forward(self, x):
            return x * (self.left + self.right)

    squares = jvp(Sum(), 1.0, torch.ones(1, 50), tangents=20).sd.square()
    # the mean of 1,000 squares with variance 2, scaled by 2
    assert float(squares.mean()) == pytest.approx(2, abs=5 * 2 * math.sqrt(2 / 1000))


def test_a_tied_parameter_has_one_tangent():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.first(x))

    model, x = Tied().double(), torch.ones(1, 1, dtype=torch.float64)
    found = jvp(model, 0.1, x, tangents=800)
    assert near(found, disturbance_test(model, model, model, 0.1, x))  # two tangents: half the variance
    for name in ("first.weight", "last.weight"):
        assert torch.equal(jvp(model, {name: 0.1}, x, tangents=800).sd, found.sd)
        each = {name: torch.full((1, 1), 0.1)}
        torch.testing.assert_close(jvp(model, each, x, tangents=800).sd, found.sd)
    with pytest.raises(InputError, match=r"the tensor differs from that of 'last.weight', its tied twin"):
        jvp(model, {"last.weight": torch.tensor([[0.2]]), "first.weight": torch.tensor([[0.1]])}, x)


def tower():
    return built(
        lambda: VisionTransformer(
            image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2, output_dim=5
        ).double()
    )


def encoder():
    layer = built(lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True))
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten()).double()


class Attention(nn.Module):
    """As timm and Hugging Face call it."""

    def __init__(self):
        super().__init__()
        self.qkv = built(lambda: nn.Linear(6, 18))

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


TRANSFORMERS = {
    "open_clip": (tower, (3, 3, 8, 8)),
    "torch": (encoder, (3, 4, 6)),
    "fused attention": (lambda: Attention().double(), (3, 4, 6)),
}


@pytest.mark.parametrize(("make", "shape"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers_on_a_batch_at_once(make, shape):
    model, x = make(), gaussian(*shape, seed=4)
    fast = torch.backends.mha.get_fastpath_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()
    found = jvp(model, 1e-4, x, tangents=200)
    assert near(found, disturbance_test(model, model, model, 1e-4, x))
    assert not found.statistic.any(), "equal parameters must give equal bits"
    assert model.training
    assert not any(parameter.requires_grad is False or parameter.grad is not None for parameter in model.parameters())
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == (fast, flash)


def test_half_precision():
    model, x = tower(), gaussian(2, 3, 8, 8, seed=5)
    exact = jvp(model, 1e-4, x)
    half = jvp(model.bfloat16(), 1e-4, x.bfloat16())
    assert half.sd.dtype == torch.float64
    assert half.sd.shape == exact.sd.shape
    assert (half.sd > 0).all()


def test_a_variance_for_every_entry_and_a_head_that_is_not_disturbed():
    model, head = nn.Linear(5, 3).double(), nn.Linear(3, 2, bias=False).double()
    x, V = gaussian(4, 5), gaussian(3, 5, seed=1).square()
    V[0] = 0
    exact = disturbance_test(model, model, model, {"weight": V.float(), "bias": 0.2}, x, head=head)
    inner = x.square() @ V.float().double().T + 0.2
    expected = (inner @ head.weight.square().T).sqrt().detach()
    torch.testing.assert_close(exact.sd, expected)
    assert torch.equal(exact.predicted, head(model(x)).argmax(-1))
    assert near(jvp(model, {"weight": V, "bias": 0.2}, x, head=head, tangents=800), exact)
    assert not jvp(model, {"weight": torch.zeros(3, 5)}, x).sd.any()
    for wrong, error, pattern in (
        (torch.ones(5, 3), ShapeError, r"tolerated_variance\['weight'\].*\(3, 5\).*\(5, 3\)"),
        (-V, InputError, r"tolerated_variance\['weight'\].*>= 0.*-"),
        (V / 0, NonFiniteError, r"tolerated_variance\['weight'\]"),
        (V + 0j, TypeError, r"tolerated_variance\['weight'\].*complex"),
    ):
        with pytest.raises(error, match=pattern):
            disturbance_test(model, model, model, {"weight": wrong}, x)


class Backward(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Custom(nn.Linear):
    def forward(self, x):
        return Backward.apply(super().forward(x))


class Broken(nn.Linear):
    def forward(self, x):
        raise RuntimeError("a failure of the model's own")


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


def test_models_that_cannot_do_it_and_errors_of_their_own():
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"model: cannot be differentiated in forward mode.*method='exact'"):
        jvp(Custom(3, 2), 1.0, x)
    assert disturbance_test(Custom(3, 2), Custom(3, 2), Custom(3, 2), 1.0, x).sd.all()
    with pytest.raises(RuntimeError, match="the model's own"):
        jvp(Broken(3, 2), 1.0, x)
    with pytest.raises(InputError, match="no gradient"):
        jvp(Detached(3, 2), 1.0, x)
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_only_forward_mode_needs():
    model, x = nn.Linear(3, 2), torch.ones(2, 3)
    with pytest.raises(InputError, match=r"seed: expected an int.*'jvp'.*None"):
        jvp(model, 1.0, x, seed=None)
    with pytest.raises(InputError, match=r"tangents: .*at least 1, got 0"):
        jvp(model, 1.0, x, tangents=0)
    with pytest.raises(TypeError, match="seed"):
        jvp(model, 1.0, x, seed="0")
    with pytest.raises(ShapeError, match=r"expected logits \(2, K\) for 2 inputs, got \(1, 4\)"):
        jvp(nn.Sequential(model, nn.Flatten(0), nn.Unflatten(0, (1, 4))), 1.0, x)
    with pytest.raises(NonFiniteError, match="logits"):
        jvp(model, 1.0, x * math.inf)
