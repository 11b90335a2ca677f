"""Stacked heads against heads alone, autograd with torch's optimiser, and LARS written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harmonize.functional.probe_heads import HeadStack

LRS = (0.01, 0.1, 1.0)
FEATURES, CLASSES, BATCH = 7, 5, 16


def batches(num, dtype=torch.float64, size=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for i in range(num):
        rows = size - 3 * (i % 4 == 3)  # now and then a smaller batch, as at the end of an epoch
        x = torch.randn(rows, FEATURES, generator=generator, dtype=dtype) * 2 + 1
        yield x, torch.randint(CLASSES, (rows,), generator=generator), 1 - i / num


def stack(lrs=LRS, decays=0.0, seed=0, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(seed)
    return HeadStack(FEATURES, CLASSES, lrs, decays, generator=generator, dtype=dtype, init_std=0.5, **options)


def train(heads, steps=20, dtype=torch.float64, **options):
    for x, labels, scale in batches(steps, dtype):
        heads.step(x, labels, scale, **options)
    return heads


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_together_is_alone(optimizer, batch_norm):
    decays = (0.0, 1e-2, 1e-1)
    together = train(stack(decays=decays, optimizer=optimizer, batch_norm=batch_norm))
    for i, (lr, decay) in enumerate(zip(LRS, decays, strict=True)):
        alone = train(stack((lr,), decay, optimizer=optimizer, batch_norm=batch_norm))
        close(together.weight[i], alone.weight[0])
        close(together.bias[i], alone.bias[0])
        close(together.running_var, alone.running_var)
    assert not torch.allclose(together.weight[0], together.weight[1])


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_sgd_is_torchs(batch_norm, decay):
    heads = stack(decays=decay, batch_norm=batch_norm)
    start = heads.state_dict()
    train(heads)
    x_eval = next(batches(1, seed=9))[0]
    for i, lr in enumerate(LRS):
        norm = nn.BatchNorm1d(FEATURES, eps=1e-6, affine=False, dtype=torch.float64) if batch_norm else nn.Identity()
        linear = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        linear.weight.data, linear.bias.data = start["weight"][i].clone(), start["bias"][i].clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr, momentum=0.9, weight_decay=decay)
        for x, labels, scale in batches(20):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.zero_grad()
            F.cross_entropy(linear(norm(x)), labels).backward()
            optimizer.step()
        close(heads.weight[i], linear.weight.data)
        close(heads.bias[i], linear.bias.data)
        if batch_norm:
            close(heads.running_mean, norm.running_mean)
            close(heads.running_var, norm.running_var)
        close(heads.logits(x_eval)[i], linear(norm.eval()(x_eval)).detach())


def naive_lars(weight, bias, lr, decay, steps):
    """MAE's LARS written out, gradients by autograd."""
    mu = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for x, labels, scale in batches(steps):
        weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        grads = torch.autograd.grad(F.cross_entropy(x @ weight.T + bias, labels), (weight, bias))
        new = []
        for i, (parameter, grad) in enumerate(zip((weight, bias), grads, strict=True)):
            if parameter.ndim > 1:
                grad = grad + decay * parameter
                norm, length = parameter.norm().item(), grad.norm().item()
                grad = grad * (0.001 * norm / length if norm > 0 and length > 0 else 1.0)
            mu[i] = 0.9 * mu[i] + grad
            new.append(parameter - lr * scale * mu[i])
        weight, bias = new
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("init_std", [0.0, 0.5])  # from zero the first step has no trust ratio
def test_lars_is_maes(init_std):
    decays = (0.0, 0.1, 1.0)
    generator = torch.Generator().manual_seed(3)
    options = {"optimizer": "lars", "init_std": init_std, "generator": generator, "dtype": torch.float64}
    heads = HeadStack(FEATURES, CLASSES, (0.1, 1.0, 10.0), decays, **options)
    start = heads.state_dict()
    train(heads)
    for i, lr in enumerate((0.1, 1.0, 10.0)):
        weight, bias = naive_lars(start["weight"][i], start["bias"][i], lr, decays[i], 20)
        close(heads.weight[i], weight)
        close(heads.bias[i], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_head_is_the_head(dtype):
    heads = train(stack(batch_norm=True, dtype=dtype), dtype=dtype)
    x = next(batches(1, dtype))[0]
    for i in range(len(LRS)):
        weight, bias = heads.fold(i)
        torch.testing.assert_close(F.linear(x, weight, bias), heads.logits(x)[i])
    weight.zero_()
    assert heads.weight[i].abs().min() > 0


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_resumed_run_is_bit_identical(optimizer):
    options = {"decays": 1e-2, "optimizer": optimizer, "batch_norm": True, "dtype": torch.float32}
    whole, first, second = (stack(seed=seed, **options) for seed in (0, 0, 1))
    data = list(batches(20, torch.float32))
    for batch in data:
        whole.step(*batch)
    for batch in data[:9]:
        first.step(*batch)
    state = first.state_dict()
    first.step(*data[9])  # what was saved does not move on with the heads
    second.load_state_dict(state)
    for batch in data[9:]:
        second.step(*batch)
    for name, value in second.state_dict().items():
        assert value.equal(whole.state_dict()[name]), name


def test_a_head_that_diverges_harms_no_other():
    heads = train(stack((0.1, 1e308)), steps=30)
    assert not heads.weight[1].isfinite().all()
    close(heads.weight[0], train(stack((0.1,)), steps=30).weight[0])


def test_all_heads_start_from_the_same_small_weights():
    heads = HeadStack(400, 50, (1.0, 2.0), generator=torch.Generator().manual_seed(0))
    assert heads.weight[0].equal(heads.weight[1])
    assert heads.weight[0].std().item() == pytest.approx(0.01, rel=0.02)
    assert not heads.bias.any()


def test_gradients_are_averaged_over_ranks():
    (x, labels, _) = next(batches(1))
    ranks = [stack(), stack()]
    gradients = []
    for heads, half in zip(ranks, (slice(0, 8), slice(8, 16)), strict=True):
        seen = []

        def reduce(gradient, seen=seen):
            seen.append(gradient.clone())
            return gradient

        heads.step(x[half], labels[half], reduce=reduce)
        gradients.append(seen)
    means = iter([(a + b) / 2 for a, b in zip(*gradients, strict=True)])
    joint, whole = stack(), stack()
    joint.step(x[:8], labels[:8], reduce=lambda _: next(means))
    whole.step(x, labels)
    close(joint.weight, whole.weight)
    close(joint.bias, whole.bias)


def test_columns_of_a_wider_matrix_and_half_precision():
    (x, labels, _) = next(batches(1))
    wide = torch.cat([x + 1, x, x + 2], 1)
    plain, sliced, half = stack(), stack(), stack()
    plain.step(x, labels)
    sliced.step(wide[:, FEATURES : 2 * FEATURES], labels)
    close(sliced.weight, plain.weight)
    half.step(x.half(), labels)
    rounded = stack()
    rounded.step(x.half().to(rounded.weight.dtype), labels)  # half precision costs the rounding of the features alone
    assert half.weight.equal(rounded.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": ()}, "lrs"),
        ({"decays": (0.1, 0.2)}, "weight_decays"),
        ({"optimizer": "adam"}, "optimizer=adam"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        stack(**options)


def test_a_state_of_other_heads_is_refused():
    with pytest.raises(ValueError, match="these heads need"):
        stack().load_state_dict(stack((0.1,)).state_dict())
    with pytest.raises(ValueError, match="these heads need"):
        stack().load_state_dict({"weight": stack().weight})
