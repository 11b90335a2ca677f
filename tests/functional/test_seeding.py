import torch

from harmonize.functional.seeding import mix, mix_int, uniform


def test_known_values_of_splitmix64():
    """The first outputs of splitmix64 with state 0, the published test vector."""
    assert mix(0).item() & ((1 << 64) - 1) == 0xE220A8397B1DCDAF


def test_order_matters_and_tensors_equal_ints():
    assert mix_int(1, 2) != mix_int(2, 1)
    index = torch.arange(50)
    assert [mix_int(3, 5, i) for i in range(50)] == [v % 2**63 for v in mix(3, 5, index).tolist()]


def test_uniform_is_uniform_and_independent_of_the_batch():
    seeds = mix(0, torch.arange(2000))
    u = uniform(seeds, 50)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.histc(u, 10, 0, 1) / u.numel()
    assert (histogram - 0.1).abs().max() < 0.003
    assert abs(torch.corrcoef(u[:, :2].T)[0, 1]) < 0.06
    assert abs(torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1]) < 0.06
    assert torch.equal(uniform(seeds[7:9], 50), u[7:9])
    assert torch.equal(uniform(seeds, 20), u[:, :20])
