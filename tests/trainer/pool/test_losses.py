import torch
import torch.nn.functional as F
from torch import nn

from clipweld.trainer.config import PoolConfig
from clipweld.trainer.method import ExpertPool, Router, RoutingPosition, contrastive_loss, orthogonality_loss


def test_contrastive_loss_equals_the_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 6, generator=generator), dim=-1) for _ in range(2))
    labels = [2, 0, 2, 1]
    scale = 7.0
    total = 0.0
    for rows, columns in ((image, text), (text, image)):
        for i, row in enumerate(rows):
            scores = torch.stack([scale * row @ column for column in columns])
            positives = [j for j in range(4) if labels[j] == labels[i]]
            total -= sum(scores[j] - scores.logsumexp(0) for j in positives) / len(positives)
    got = contrastive_loss(image, text, torch.tensor(labels), torch.tensor(scale))
    torch.testing.assert_close(got, total / 8, atol=1e-5, rtol=1e-5)


def pool_of(columns, counts):
    config = PoolConfig(rank=3, k_active=2, k_merge=2)
    router = Router(3, config, RoutingPosition(sharded=True), torch.device("cpu"))
    pool = ExpertPool(nn.Linear(3, 4), config, router)
    pool.lora_B.data = columns
    router.activation_counts += torch.tensor(counts)
    return pool


def test_orthogonality_loss_equals_the_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    pools = {name: pool_of(torch.randn(4, 3, generator=generator), [3, 1, 2]) for name in ("one", "two")}
    past = {name: torch.randn(4, 5, generator=generator) for name in pools}
    sums = [
        sum(
            abs(float(pools[name].lora_B[:, now].detach() @ past[name][:, then])) for now in (0, 2) for then in range(5)
        )
        for name in pools
    ]
    torch.testing.assert_close(orthogonality_loss(pools, past, "sum").item(), sum(sums) / 2, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(orthogonality_loss(pools, past, "mean").item(), sum(sums) / 20, atol=1e-4, rtol=1e-5)


def test_orthogonality_loss_is_zero_for_the_first_task_and_for_orthogonal_columns():
    pools = {"one": pool_of(torch.eye(4)[:, :3], [1, 1, 0])}
    assert orthogonality_loss(pools, {}, "sum") == 0
    assert orthogonality_loss(pools, {"one": torch.eye(4)[:, 2:]}, "sum") == 0
