import pytest
import torch

from clipweld.trainer.method.dropout import ByteDropout


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 5, 4099), (60001,)])
def test_the_given_share_is_zeroed_evenly(p, shape):
    """Every eighth element comes from the same byte of a random word: a bias of one byte would show."""
    dropout = ByteDropout(p)
    out = dropout(torch.ones(shape))
    assert out.shape == shape
    assert out.unique().tolist() == [0, 1]
    assert dropout.kept == pytest.approx(1 - p, abs=1 / 512)
    for start in range(8):
        assert out.flatten()[start::8].mean() == pytest.approx(dropout.kept, abs=0.025)


def test_gradients_are_zeroed_where_values_are():
    x = torch.randn(1000, requires_grad=True)
    out = ByteDropout(0.2)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient * x, out)


def test_masks_follow_the_seed_and_differ_from_call_to_call():
    dropout, x = ByteDropout(0.5), torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_dropped_in_eval_mode_nor_at_rate_zero(dtype):
    x = torch.randn(100, dtype=dtype)
    assert ByteDropout(0.0)(x) is x
    assert ByteDropout(0.9).eval()(x) is x
    assert ByteDropout(0.9)(x).dtype == dtype
