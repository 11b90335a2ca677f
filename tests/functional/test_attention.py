"""Second derivations of what is read from attention maps: published vectors, naive fp64 loops, planted maps."""

import math

import pytest
import torch

from harmonize.functional.attention import (
    EPSILON,
    attention_distance,
    attention_entropy,
    head_divergence,
    head_map_similarity,
    mean_log_products,
    normalized_mutual_information,
    patch_attention,
    patch_distances,
    prefix_mass,
)

GRID, PATCH = (14, 14), 16
NUM = GRID[0] * GRID[1]


def random_attention(*shape, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype)


def nmi(attention):
    return normalized_mutual_information(attention, attention_entropy(mean_log_products(attention, attention.log())))


def offsets():
    """Rows and columns (N, N) from query to key, in patches."""
    row, column = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij"))
    return row[None] - row[:, None], column[None] - column[:, None]


def box(radius):
    """As much of a box around the query as lies on the grid, all of it alike."""
    rows, columns = offsets()
    return ((rows.abs() <= radius) & (columns.abs() <= radius)).double()


def gaussian(sigma_px):
    """Cut off by the border of the grid, and renormalised."""
    rows, columns = offsets()
    return (-(PATCH**2) * (rows**2 + columns**2).double() / (2 * sigma_px**2)).exp()


def to_first_key():
    attention = torch.zeros(NUM, NUM, dtype=torch.float64)
    attention[:, 0] = 1
    return attention


def next_column():
    """Each patch to its right neighbour, the last of a row to the first of the same row."""
    rows, columns = offsets()
    return ((rows == 0) & ((columns - 1) % GRID[1] == 0)).double()


UNIFORM = torch.full((NUM, NUM), 1 / NUM, dtype=torch.float64)
IDENTITY = torch.eye(NUM, dtype=torch.float64)
VECTORS = {  # computed with the official code on 14 x 14 patches of 16 px
    "uniform": (UNIFORM, 116.492, 0.0),
    "identity": (IDENTITY, 0.0, 1.0),
    "3 x 3 box": (box(1), 16.698, 0.6046),
    "5 x 5 box": (box(2), 28.831, 0.4281),
    "gaussian 16 px": (gaussian(16), 18.431, 0.4993),
    "gaussian 32 px": (gaussian(32), 36.680, 0.2752),
    "gaussian 64 px": (gaussian(64), 67.156, 0.0905),
    "all to key 0": (to_first_key(), 161.030, 0.0),
    "next column": (next_column(), 29.714, 1.0),
    "half uniform, half identity": ((UNIFORM + IDENTITY) / 2, 58.246, 0.3717),
}


@pytest.mark.parametrize(("attention", "distance", "information"), VECTORS.values(), ids=VECTORS)
def test_the_official_numbers_of_closed_form_maps(attention, distance, information):
    # Given as the network gives it: with a class token that takes and gives attention, in fp32.
    full = torch.zeros(1, 1, 1 + NUM, 1 + NUM)
    full[..., 1:, 1:] = 0.75 * attention / attention.sum(dim=-1, keepdim=True)
    full[..., 1:, 0] = 0.25
    full[..., 0, :] = 1 / (1 + NUM)
    ours = attention_distance(patch_attention(full, 1), patch_distances(GRID, PATCH))
    assert ours.shape == (1, 1)
    assert ours.item() == pytest.approx(distance, abs=6e-4)  # half a unit of the last digit, and a little
    assert nmi(patch_attention(full, 1, EPSILON)).item() == pytest.approx(information, abs=6e-5)


@pytest.mark.parametrize(
    ("side", "patch_size", "distance"),
    [(14, 16, 116.49), (12, 16, 99.75), (28, 8, 116.72), (37, 14, 269.99), (8, 4, 16.55)],
)
def test_the_distance_of_uniform_attention(side, patch_size, distance):
    num = side * side
    ours = attention_distance(torch.full((num, num), 1 / num), patch_distances((side, side), patch_size)).item()
    assert ours == pytest.approx(distance, abs=6e-3)
    # And exactly: a distance of i rows and j columns occurs 4 (side - i)(side - j) times, half as often for 0 of one.
    exact = sum(
        (1 if i == 0 else 2) * (1 if j == 0 else 2) * (side - i) * (side - j) * math.hypot(i, j)
        for i in range(side)
        for j in range(side)
    )
    assert ours == pytest.approx(patch_size * exact / num**2, rel=1e-6)


# --- patch_attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("epsilon", [0.0, EPSILON, 0.01])
def test_patch_attention_against_a_naive_loop(num_prefix, epsilon):
    attention = random_attention(2, 3, num_prefix + 4, num_prefix + 4)
    ours = patch_attention(attention, num_prefix, epsilon)
    assert ours.shape == (2, 3, 4, 4)
    for b, h, q in [(b, h, q) for b in range(2) for h in range(3) for q in range(4)]:
        row = [value + epsilon for value in attention[b, h, num_prefix + q].tolist()[num_prefix:]]
        assert ours[b, h, q].tolist() == pytest.approx([value / sum(row) for value in row], rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
def test_a_row_without_mass_on_patches_becomes_uniform(epsilon):
    attention = torch.zeros(5, 5)
    attention[:, 0] = 1  # all of it to the class token
    attention[2, :] = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0])
    ours = patch_attention(attention, 1, epsilon)
    torch.testing.assert_close(ours[[0, 2, 3]], torch.full((3, 4), 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], torch.tensor([0.0, 1.0, 0.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_prefix_tokens_move_no_number_of_the_patches(num_prefix):
    """Whatever goes to prefix tokens: what is left is as without them."""
    patches = random_attention(2, 3, 6, 6)
    share = torch.rand(2, 3, 6, 1, generator=torch.Generator().manual_seed(1))  # of each query, to prefix tokens
    full = random_attention(2, 3, num_prefix + 6, num_prefix + 6, seed=2)
    if num_prefix:
        full[..., num_prefix:, :num_prefix] = share / num_prefix
        full[..., num_prefix:, num_prefix:] = patches * (1 - share)
    else:
        full = patches
    distances = patch_distances((2, 3), 16)
    torch.testing.assert_close(
        attention_distance(patch_attention(full, num_prefix), distances), attention_distance(patches, distances)
    )
    # epsilon is added to what is left, so that it weighs more where less is left: by 1e-8 / 1e-2 at the most here
    torch.testing.assert_close(nmi(patch_attention(full, num_prefix, EPSILON)), nmi(patches), rtol=1e-4, atol=1e-5)
    mass = share.mean(dim=(2, 3)) if num_prefix else torch.zeros(2, 3)
    torch.testing.assert_close(prefix_mass(full, num_prefix), mass)


def test_prefix_mass_against_a_naive_loop():
    attention = random_attention(2, 3, 7, 7)
    for num_prefix in (0, 1, 5):
        ours = prefix_mass(attention, num_prefix)
        for b in range(2):
            for h in range(3):
                rows = attention[b, h].tolist()[num_prefix:]
                want = sum(sum(row[:num_prefix]) for row in rows) / len(rows)
                assert ours[b, h].item() == pytest.approx(want, rel=1e-6)


# --- distance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (4, 4), (5, 3), (1, 6), (1, 1)])
def test_distances_and_attention_distance_against_a_naive_loop(grid):
    rows, columns = grid
    num = rows * columns
    distances = patch_distances(grid, 7)
    attention = random_attention(2, 3, num, num, scale=2)
    want = torch.zeros(2, 3, dtype=torch.float64)
    for q in range(num):
        for k in range(num):
            px = 7 * math.sqrt((q // columns - k // columns) ** 2 + (q % columns - k % columns) ** 2)
            assert distances[q, k].item() == pytest.approx(px, rel=1e-6)
            want += attention[..., q, k].double() * px / num
    torch.testing.assert_close(attention_distance(attention, distances).double(), want, rtol=1e-6, atol=1e-6)


def test_distance_sees_queries_as_rows():
    attention = torch.zeros(3, 3)
    attention[:, 0] = 1  # every query to the first key: 0, 1 and 2 patches away
    attention[1] = torch.tensor([0.0, 0.0, 1.0])
    distances = torch.tensor([[0.0, 1.0, 2.0], [10.0, 0.0, 100.0], [1000.0, 1.0, 0.0]])  # not symmetric, on purpose
    assert attention_distance(attention, distances).item() == pytest.approx((0 + 100 + 1000) / 3)


# --- entropy, mutual information -------------------------------------------------------------------------------------


def naive_entropy(attention):
    """Mean over queries of -sum p log p, in nats."""
    return sum(-sum(p * math.log(p) for p in row if p > 0) for row in attention) / len(attention)


def naive_nmi(attention):
    """From the joint distribution of query and key: I / sqrt(H(q) H(k)), queries equally frequent."""
    num = len(attention)
    joint = [[p / num for p in row] for row in attention]
    query = [sum(row) for row in joint]
    key = [sum(row[k] for row in joint) for k in range(num)]
    information = sum(
        joint[q][k] * math.log(joint[q][k] / (query[q] * key[k]))
        for q in range(num)
        for k in range(num)
        if joint[q][k] > 0
    )
    entropies = [-sum(p * math.log(p) for p in marginal if p > 0) for marginal in (query, key)]
    return information / math.sqrt(entropies[0] * entropies[1])


@pytest.mark.parametrize("scale", [0.03, 1.0, 5.0])
@pytest.mark.parametrize("num", [2, 5, 6])
def test_entropy_and_nmi_against_the_joint_distribution(num, scale):
    attention = patch_attention(random_attention(2, 3, num + 1, num + 1, scale=scale), 1, EPSILON)
    entropy = attention_entropy(mean_log_products(attention, attention.log()))
    ours = normalized_mutual_information(attention, entropy)
    assert entropy.shape == ours.shape == (2, 3)
    for b in range(2):
        for h in range(3):
            rows = attention[b, h].double().tolist()
            assert entropy[b, h].item() == pytest.approx(naive_entropy(rows), rel=1e-6, abs=1e-7)
            assert ours[b, h].item() == pytest.approx(naive_nmi(rows), abs=5e-7)


def test_log_products_against_a_naive_loop():
    attention = random_attention(2, 3, 4, 4, scale=2)
    other = random_attention(2, 3, 4, 4, scale=2, seed=1).log()  # any second factor, so that g and h are told apart
    ours = mean_log_products(attention, other)
    for b, g, h in [(b, g, h) for b in range(2) for g in range(3) for h in range(3)]:
        pairs = zip(attention[b, g].flatten().tolist(), other[b, h].flatten().tolist(), strict=True)
        assert ours[b, g, h].item() == pytest.approx(sum(p * log for p, log in pairs) / 4, rel=1e-6)


def test_uniform_attention_has_all_entropy_and_no_information():
    attention = torch.full((2, 3, 12, 12), 1 / 12)
    entropy = attention_entropy(mean_log_products(attention, attention.log()))
    torch.testing.assert_close(entropy / math.log(12), torch.ones(2, 3), rtol=1e-6, atol=0)
    assert 0 <= nmi(attention).min() <= nmi(attention).max() <= 1e-6


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0])
def test_queries_that_attend_alike_have_no_information_sharply_or_not(sharpness):
    one_row = (sharpness * torch.arange(12.0)).softmax(-1)
    attention = patch_attention(one_row.expand(1, 1, 12, 12), 0, EPSILON)
    entropy = attention_entropy(mean_log_products(attention, attention.log())).item()
    assert entropy == pytest.approx(naive_entropy(attention[0, 0].double().tolist()), rel=1e-5)
    information = nmi(attention).item()
    assert 0 <= information <= 1e-4


def test_collapsed_attention_without_epsilon_is_the_reason_for_epsilon():
    attention = torch.zeros(1, 1, 4, 4)
    attention[..., 2] = 1
    assert nmi(attention).isnan().all()  # 0 log 0
    assert nmi(patch_attention(attention, 0, EPSILON)).abs().max() < 1e-6


def test_nmi_asks_who_attends_to_whom_and_not_where_they_are():
    attention = random_attention(1, 2, 6, 6, scale=2)
    permuted = attention[..., torch.tensor([3, 0, 5, 1, 4, 2])]
    torch.testing.assert_close(nmi(permuted), nmi(attention), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(nmi(permuted.flip(-2)), nmi(attention), rtol=1e-6, atol=1e-7)
    distances = patch_distances((2, 3), 16)
    assert (attention_distance(permuted, distances) - attention_distance(attention, distances)).abs().min() > 0.1


@pytest.mark.parametrize("num_blocks", [2, 3, 6])
def test_nmi_of_blocks(num_blocks):
    """Within each of m equal groups of patches uniform: I = log m of H = log N."""
    group = torch.arange(12) % num_blocks
    attention = (group[:, None] == group[None]).float() * num_blocks / 12
    value = nmi(patch_attention(attention[None], 0, EPSILON)).item()
    assert value == pytest.approx(math.log(num_blocks) / math.log(12), abs=1e-5)


@pytest.mark.parametrize("side", [14, 37])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_fp32_is_enough(side, scale, num_heads):
    """The information of near-uniform attention is a millionth of the entropies whose difference it is."""
    num = side * side
    attention = patch_attention(random_attention(1, num_heads, num, num, scale=scale), 0, EPSILON)
    ours, exact = nmi(attention), attention.double()
    key = exact.mean(dim=-2, keepdim=True)
    information = (exact * (exact / key).log()).sum(dim=(-2, -1)) / num  # no difference of large numbers
    want = information / (math.log(num) * torch.special.entr(key).sum(dim=(-2, -1))).sqrt()
    assert (ours >= 0).all()
    torch.testing.assert_close(ours.double(), want, rtol=0, atol=1e-6 if side == 14 else 5e-6)
    distances = patch_distances((side, side), 16)
    want = (exact * distances.double()).sum(dim=(-2, -1)) / num
    torch.testing.assert_close(attention_distance(attention, distances).double(), want, rtol=1e-6, atol=0)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_head_divergence_against_a_naive_loop():
    attention = random_attention(2, 3, 5, 5, scale=1.5)
    ours = head_divergence(mean_log_products(attention, attention.log()))
    for b in range(2):
        heads = attention[b].double().tolist()
        for g in range(3):
            total = sum(
                p * math.log(p / heads[h][q][k])
                for h in range(3)
                if h != g
                for q in range(5)
                for k, p in enumerate(heads[g][q])
            )
            assert ours[b, g].item() == pytest.approx(total / (2 * 5), rel=1e-5)


def test_equal_heads_do_not_diverge_and_are_alike():
    attention = random_attention(2, 1, 5, 5, scale=1.5).expand(2, 4, 5, 5)
    assert head_divergence(mean_log_products(attention, attention.log())).abs().max() < 1e-6
    torch.testing.assert_close(head_map_similarity(attention), torch.ones(2, 4))


def test_heads_that_share_no_key_are_not_alike():
    left = torch.zeros(4, 4)
    left[:, :2] = 0.5
    attention = torch.stack([left, left.flip(-1), left])
    torch.testing.assert_close(head_map_similarity(attention), torch.tensor([0.5, 0.0, 0.5]))


def test_head_map_similarity_against_a_naive_loop():
    attention = random_attention(2, 3, 5, 5, scale=1.5)
    ours = head_map_similarity(attention)
    for b in range(2):
        heads = attention[b].double().tolist()
        for g in range(3):
            cosines = [
                sum(x * y for x, y in zip(heads[g][q], heads[h][q], strict=True))
                / math.sqrt(sum(x * x for x in heads[g][q]) * sum(y * y for y in heads[h][q]))
                for h in range(3)
                if h != g
                for q in range(5)
            ]
            assert ours[b, g].item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_single_head_has_no_others():
    attention = random_attention(2, 1, 4, 4)
    for value in (head_divergence(mean_log_products(attention, attention.log())), head_map_similarity(attention)):
        assert value.shape == (2, 1)
        assert value.isnan().all()


def test_a_single_patch_has_no_information():
    attention = torch.ones(2, 3, 1, 1)
    assert nmi(attention).shape == (2, 3)
    assert nmi(attention).isnan().all()
    assert (attention_distance(attention, patch_distances((1, 1), 16)) == 0).all()


def test_no_images():
    attention = patch_attention(torch.zeros(0, 3, 7, 7), 1, EPSILON)
    assert attention.shape == (0, 3, 6, 6)
    products = mean_log_products(attention, attention.log())
    assert products.shape == (0, 3, 3)
    assert attention_distance(attention, patch_distances((2, 3), 16)).shape == (0, 3)
    assert nmi(attention).shape == attention_entropy(products).shape == head_divergence(products).shape == (0, 3)
    assert head_map_similarity(attention).shape == prefix_mass(torch.zeros(0, 3, 7, 7), 1).shape == (0, 3)
