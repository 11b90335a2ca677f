"""One pass over a list of images: its result depends on the images alone, and it leaves no trace in the network."""

import math
import os
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harmonize.diagnostics import measure as module
from harmonize.diagnostics.attention_distance import AttentionDistance
from harmonize.diagnostics.base import AttentionMaps, Diagnostic, Images
from harmonize.diagnostics.head_diversity import HeadSimilarity
from harmonize.diagnostics.measure import measure
from harmonize.types import AttentionView, ConfigError, Findings, TokensView
from tests.diagnostics.probes import all_diagnostics, assert_same, clean_batch, numbers, opinionated, part

PRECISIONS = ["medium", "high", "highest"]
BOUNDS = {"alignment": 3, "attention_maps": 2, "token_colors": 4, "token_moves": 3, "attention_distance": 5}


class Seen(Diagnostic):
    """Writes down what it is shown."""

    min_images = 1

    def __init__(self, spec, kinds, second_view=False, **bounds):
        super().__init__(spec, **bounds)
        self.sees, self.sees_second_view = kinds, second_view
        self.shown = []

    def prepare(self, spec):
        self.declare("row", 1)

    def update(self, view, index, second=False):
        self.shown.append((type(view), getattr(view, "layer", None), index.tolist(), second))
        self.add("row", 0, index, index)

    def describe(self, rows):
        return Findings()


@pytest.fixture(scope="module")
def eight():
    """A network, 8 images of it at the positions 10 ... 17, and what all diagnostics say of them in one batch."""
    encoder = opinionated()
    batch = clean_batch(encoder.spec, 8, first=10)
    diagnostics = all_diagnostics(encoder.spec, **BOUNDS)
    return encoder, batch, measure(encoder, [batch], diagnostics, batch.index.tolist())


def look(encoder, batches, indices=range(10, 18), **bounds):
    return measure(encoder, batches, all_diagnostics(encoder.spec, **BOUNDS | bounds), indices)


# --- the result depends on the images alone --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_batches_do_not_matter(eight, size):
    encoder, batch, whole = eight
    batches = [part(batch, range(i, min(i + size, 8))) for i in range(0, 8, size)]
    assert_same(look(encoder, iter(batches)), whole, 1e-5)


def test_order_does_not_matter(eight):
    encoder, batch, whole = eight
    assert_same(look(encoder, [part(batch, [7, 3, 5]), part(batch, [0]), part(batch, [6, 2, 1, 4])]), whole, 1e-5)


def test_an_image_counts_once_however_often_it_comes(eight):
    encoder, batch, whole = eight
    twice = [part(batch, [0, 1, 2, 2, 0]), part(batch, [3, 4, 2, 5]), part(batch, [6, 7, 7])]
    assert_same(look(encoder, twice), whole, 1e-5)


def test_an_empty_batch_adds_nothing(eight):
    encoder, batch, whole = eight
    assert_same(look(encoder, [part(batch, []), batch, part(batch, [])]), whole, 1e-5)


def test_metrics_start_anew_each_time(eight):
    encoder, batch, whole = eight
    diagnostics = all_diagnostics(encoder.spec, **BOUNDS)
    other = clean_batch(encoder.spec, 6, seed=5)
    measure(encoder, [other], diagnostics, range(6))
    assert all(not getattr(d, name) for d in diagnostics.values() for name in d._defaults)  # nothing is kept either
    diagnostics["fourier"].update(TokensView(0, "embedding", torch.zeros(1, 25, 24)), torch.tensor([3]))
    assert_same(measure(encoder, [batch], diagnostics, range(10, 18)), whole, 0.0)


@pytest.mark.parametrize("images", [1, 3])
def test_chunks_of_attention_maps_do_not_matter(eight, images, monkeypatch):
    encoder, batch, whole = eight
    monkeypatch.setattr(module, "CHUNK", images * 3 * 25**2)
    seen = Seen(encoder.spec, (AttentionMaps,))
    found = measure(encoder, [batch], all_diagnostics(encoder.spec, **BOUNDS) | {"seen": seen}, range(10, 18))
    sizes = {len(index) for _, _, index, _ in seen.shown}
    assert max(sizes) == images
    assert_same(found, whole, 1e-5)


def test_numbers_of_these_tests_are_numbers(eight):
    """Else NaN would equal NaN everywhere above."""
    values = numbers(eight[2])
    assert len(values) > 90
    assert not [name for name, x in values.items() if x.isnan().any()]


def test_half_precision_around_it_changes_nothing(eight):
    encoder, batch, whole = eight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = look(encoder, [batch])
    assert_same(found, whole, 0.0)
    assert_same(look(encoder, [replace(batch, image=batch.image.double())]), whole, 0.0)


# --- ranks -----------------------------------------------------------------------------------------------------------

SHARES = {
    "uneven": [[[0, 4], [6, 2, 5]], [[1, 3, 7]]],
    "one without images": [[[0, 1, 2, 3, 4], [5, 6, 7]], []],
    "overlapping": [[[0, 1, 2, 3]], [[3, 4, 5], [6, 7, 0]]],
}


def work(rank, folder, shares):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    encoder = opinionated()
    batch = clean_batch(encoder.spec, 8, first=10)
    torch.save(numbers(look(encoder, [part(batch, rows) for rows in shares[rank]])), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SHARES)
def test_ranks_share_the_work(name, tmp_path, eight):
    shares = SHARES[name]
    mp.start_processes(work, (str(tmp_path), shares), nprocs=2, start_method="fork")
    encoder, batch, _ = eight
    alone = numbers(look(encoder, [part(batch, rows) for share in shares for rows in share]))
    for rank in (0, 1):
        ours = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(ours) == list(alone)
        for key, want in alone.items():
            atol = 1e-6 * max(1.0, want.abs().max().item())
            torch.testing.assert_close(ours[key], want, rtol=1e-6, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


# --- which images ----------------------------------------------------------------------------------------------------


def test_a_diagnostic_looks_at_its_own_evenly_spaced_images(eight):
    encoder, batch, _ = eight
    indices = [30, 31, 7, 9, 100, 5, 6, 8]  # in the order of the list, which need not be sorted
    batch = replace(batch, index=torch.tensor(indices))
    batches = [part(batch, [0, 1]), part(batch, [2, 3, 4]), part(batch, [5, 6, 7])]  # of the first only one is chosen
    diagnostics = all_diagnostics(encoder.spec, attention_distance=3, head_similarity=3, image_spectrum=3)
    found = measure(encoder, batches, diagnostics, indices)
    chosen = [int(8 * i / 3) for i in range(3)]
    assert chosen == [0, 2, 5]
    without = {name: d for name, d in all_diagnostics(encoder.spec).items() if name != "cka"}  # for three are too few
    want = measure(encoder, [part(batch, chosen)], without, chosen)
    everything = measure(encoder, [batch], all_diagnostics(encoder.spec), indices)
    for name, kind in [
        *(("attention_distance", want), ("head_similarity", want), ("image_effective_rank", want)),
        *(("nmi", everything), ("token_similarity", everything)),
    ]:
        curve = found.curves[name]
        assert curve.value == pytest.approx(kind.curves[name].value, rel=1e-5), name
        assert curve.error == pytest.approx(kind.curves[name].error, rel=1e-4), name
    assert want.curves["nmi"].value != pytest.approx(everything.curves["nmi"].value, rel=1e-3)
    assert found.num_images == 8
    assert len(found.surfaces["image_spectrum"].columns) == 2


@pytest.mark.parametrize("bound", [8, 9, 1000, None])
def test_a_bound_that_bounds_nothing(eight, bound):
    encoder, batch, _ = eight
    for seen in (Seen(encoder.spec, (Images,), num_images=bound), Seen(encoder.spec, (AttentionView,))):
        measure(encoder, [part(batch, [0, 1]), part(batch, range(2, 8))], {"seen": seen}, range(10, 18))
        assert sorted({i for _, _, index, _ in seen.shown for i in index}) == list(range(10, 18))


def test_each_diagnostic_sees_the_views_that_it_wants_and_no_others(eight):
    encoder, batch, _ = eight
    batches = [part(batch, [0, 1, 2]), part(batch, [3, 4, 5, 6, 7])]
    diagnostics = {
        "images": Seen(encoder.spec, (Images,)),
        "views": Seen(encoder.spec, (AttentionView, TokensView)),
        "maps": Seen(encoder.spec, (AttentionMaps,), num_images=2),
        "second": Seen(encoder.spec, (TokensView,), second_view=True, num_images=2),
    }
    measure(encoder, batches, diagnostics, range(10, 18))
    shown = {name: d.shown for name, d in diagnostics.items()}
    assert [x[0] for x in shown["images"]] == [Images, Images]
    assert {x[0] for x in shown["views"]} == {AttentionView, TokensView}
    assert len(shown["views"]) == 2 * (1 + 3 * 3)
    assert [x[1] for x in shown["views"]][:10] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [(x[1], x[2]) for x in shown["maps"] if x[2]] == [
        *((i, [10]) for i in (1, 2, 3)),
        *((i, [14]) for i in (1, 2, 3)),
    ]
    assert not any(x[3] for name in ("images", "views", "maps") for x in shown[name])
    assert [x[2] for x in shown["second"] if x[3] and x[1] == 3] == [[10], [10], [14], [14]]  # attention, then MLP


@pytest.mark.parametrize(("kinds", "sizes"), [((), [3, 5]), (("alignment",), [3, 1, 5, 2])])
def test_images_are_encoded_twice_only_for_those_that_want_it(eight, kinds, sizes, monkeypatch):
    encoder, batch, _ = eight
    encoded, real = [], type(encoder).visit_layers

    def visit_layers(self, images, visit):
        encoded.append(len(images))
        return real(self, images, visit)

    monkeypatch.setattr(type(encoder), "visit_layers", visit_layers)
    everything = all_diagnostics(encoder.spec, alignment=3)
    chosen = {name: d for name, d in everything.items() if name != "alignment" or kinds}
    measure(encoder, [part(batch, [0, 1, 3]), part(batch, [2, 4, 5, 6, 7])], chosen, range(10, 18))
    assert encoded == sizes


# --- what is refused -------------------------------------------------------------------------------------------------


def test_train_mode_is_refused():
    encoder = opinionated()
    encoder.blocks[1].mlp.train()
    with pytest.raises(RuntimeError, match="eval mode"):
        look(encoder, [clean_batch(encoder.spec)])


def test_batches_need_the_clean_view(eight):
    encoder, batch, _ = eight
    with pytest.raises(ValueError, match=r"Batch\.image"):
        look(encoder, [replace(batch, image=None)])


@pytest.mark.parametrize(
    ("name", "bound", "num", "least"),
    [("nmi_of_mine", 1, 8, 2), ("nmi_of_mine", None, 1, 2), ("my_cka", 3, 8, 4), ("my_cka", None, 3, 4)],
)
def test_too_few_images(eight, name, bound, num, least):
    encoder, batch, _ = eight
    kind = all_diagnostics(encoder.spec)["cka" if "cka" in name else "mutual_information"]
    kind.num_images = bound
    message = (
        rf"^The list of images for the diagnostics holds {min(bound or num, num)}, and {name} needs at least {least}: "
    )
    with pytest.raises(ConfigError, match=message):
        measure(encoder, iter(lambda: pytest.fail("a batch was loaded"), None), {name: kind}, range(num))
    kind.num_images = least
    assert measure(encoder, [batch], {name: kind}, range(10, 18)).curves


def test_images_that_cannot_be_read(eight):
    """The data set leaves out what it cannot read; the list of positions does not know."""
    encoder, batch, _ = eight
    distance = AttentionDistance(encoder.spec)
    with pytest.raises(ConfigError, match="Only 1 images for the diagnostic distance can be read; it needs more"):
        measure(encoder, [part(batch, [2])], {"distance": distance}, range(10, 18))
    for bound in (None, 8, 64):  # none of which leaves an image out
        distance = AttentionDistance(encoder.spec, num_images=bound)
        assert measure(encoder, [part(batch, [2, 3, 4])], {"distance": distance}, range(10, 18)).num_images == 3


def test_a_picture_of_a_single_image(eight):
    encoder, batch, _ = eight
    chosen = {name: all_diagnostics(encoder.spec, **{name: 1})[name] for name in ("attention_maps", "token_colors")}
    found = measure(encoder, [batch], chosen, range(10, 18))
    assert set(found.pictures) == {"attention_maps_1", "token_colors"}
    assert found.pictures["token_colors"].arrays["colors"].shape == (1, 3, 4, 6, 3)


def test_nothing_to_measure(eight):
    encoder, batch, _ = eight
    assert measure(encoder, [batch], {}, range(8)) == Findings()


def test_a_metric_offers_no_value_of_a_batch(eight):
    with pytest.raises(NotImplementedError, match="describe"):
        AttentionDistance(eight[0].spec)(None, None)


# --- no trace in the network -----------------------------------------------------------------------------------------


def test_training_does_not_notice(eight):
    _, batch, _ = eight
    encoder = opinionated(drop_path=0.5, freeze_patch_embed=True)
    encoder.blocks[0].attn.fused_attn = False
    encoder(batch.image).square().mean().backward()
    encoder.register_buffer("running", torch.ones(3))

    def state():
        return {
            **{f"value {k}": v.clone() for k, v in encoder.state_dict().items()},
            **{
                f"grad {k}": torch.zeros(0) if p.grad is None else p.grad.clone() for k, p in encoder.named_parameters()
            },
            **{f"needs {k}": torch.tensor(p.requires_grad) for k, p in encoder.named_parameters()},
            **{f"mode {k}": torch.tensor(m.training) for k, m in encoder.named_modules()},
            **{
                f"hooks {k}": torch.tensor(len(m._forward_hooks) + len(m._forward_pre_hooks))
                for k, m in encoder.named_modules()
            },
            "random": torch.get_rng_state(),
            "fused": torch.tensor([block.attn.fused_attn for block in encoder.blocks]),
            "grad mode": torch.tensor(torch.is_grad_enabled()),
            "TF32": torch.tensor(PRECISIONS.index(torch.get_float32_matmul_precision())),
        }

    before = state()
    assert {p.requires_grad for p in encoder.parameters()} == {True, False}
    image = batch.image.clone()
    torch.set_float32_matmul_precision("medium")
    before["TF32"] = torch.tensor(PRECISIONS.index("medium"))
    try:
        found = look(encoder, [batch])
        after = state()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert list(before) == list(after)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert torch.equal(batch.image, image)
    assert not any(a.requires_grad for picture in found.pictures.values() for a in picture.arrays.values())


def test_a_failure_in_between_leaves_all_as_it_was(eight):
    encoder, batch, _ = eight

    class Broken(Seen):
        def update(self, view, index, second=False):
            assert torch.get_float32_matmul_precision() == "highest"
            if view.layer == 2:
                raise KeyError("broken")

    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError):
            measure(encoder, [batch], {"broken": Broken(encoder.spec, (TokensView,))}, range(10, 18))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())


def test_no_two_layers_maps_are_alive_at_a_time(eight, monkeypatch):
    encoder, batch, _ = eight
    monkeypatch.setattr(module, "CHUNK", 2 * 3 * 25**2)
    alive, most = {}, []

    class Maps(Seen):
        def update(self, view, index, second=False):
            super().update(view, index, second)
            alive.setdefault(view.layer, weakref.WeakSet()).update([view, view.patches, view.log_products])
            most.append([layer for layer, refs in alive.items() if len(refs)])

    diagnostics = all_diagnostics(encoder.spec) | {"maps": Maps(encoder.spec, (AttentionMaps,))}
    measure(encoder, [batch], diagnostics, range(10, 18))
    assert most == 4 * [[1]] + 4 * [[2]] + 4 * [[3]]
    assert not any(map(len, alive.values()))


# --- broken and extreme networks -------------------------------------------------------------------------------------


def test_nan_in_the_weights_gives_nan_from_there_on():
    encoder = opinionated()
    batch = clean_batch(encoder.spec, 20)
    whole = measure(encoder, [batch], all_diagnostics(encoder.spec), range(20))
    with torch.no_grad():
        encoder.blocks[1].attn.qkv.weight[5, 3] = math.nan
    found = measure(encoder, [batch], all_diagnostics(encoder.spec), range(20))
    assert set(found.pictures) == set(whole.pictures)
    assert set(found.curves) == set(whole.curves)
    assert all(map(math.isnan, found.curves["image_alpha"].value))  # it is fitted over the same ranks in all layers
    for name, curve in found.curves.items():
        for layer, value, want in zip(curve.layer, curve.value, whole.curves[name].value, strict=True):
            if layer >= 2:
                assert math.isnan(value), (name, layer)
            elif name != "image_alpha":
                assert value == pytest.approx(want, rel=1e-5, abs=1e-6), (name, layer)
    assert math.isnan(found.surfaces["cka"].value[0][2])
    assert found.surfaces["cka"].value[0][1] == pytest.approx(whole.surfaces["cka"].value[0][1], rel=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("part_of", ["patch_embed.proj.weight", "blocks.2.mlp.fc2.weight", "pos_embed"])
def test_broken_weights_raise_nothing_anywhere(broken, part_of):
    encoder = opinionated()
    batch = clean_batch(encoder.spec, 6)
    with torch.no_grad():
        encoder.get_parameter(part_of).fill_(broken)
    found = measure(encoder, [batch], all_diagnostics(encoder.spec), range(6))
    first = 3 if "blocks" in part_of else 0
    for name in ("token_similarity", "token_effective_rank", "image_effective_rank", "uniformity", "fourier"):
        curve = found.curves[name]
        assert all(math.isfinite(x) != (layer >= first) for layer, x in zip(curve.layer, curve.value, strict=True)), (
            name
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 1},
        {"num_heads": 1, "width": 4, "depth": 1},
        {"image_size": 8, "num_heads": 6},
        {"image_size": (4, 16)},
        {"image_size": (16, 4), "depth": 1},
        {"image_size": (12, 20), "depth": 5},
    ],
)
def test_small_and_strange_networks(options):
    encoder = opinionated(**options)
    spec = encoder.spec
    batch = clean_batch(spec, 6)
    found = measure(encoder, [batch], all_diagnostics(spec), range(6))
    assert [name for name, x in numbers(found).items() if not x.isfinite().all()] == []
    between = {"head_divergence", "head_map_similarity", "head_similarity"}
    assert between & set(found.curves) == (set() if spec.num_heads == 1 else between)
    assert len(found.curves) == (25 if spec.num_heads > 1 else 22)
    for name, curve in found.curves.items():
        assert len(curve.value) == len(curve.layer) == spec.depth + (curve.layer[0] == 0), name
        if curve.heads is not None:
            assert {len(heads) for heads in curve.heads} == {spec.num_heads}, name
    for surface in found.surfaces.values():
        assert {len(row) for row in surface.value} == {len(surface.columns)}
        assert len(surface.value) == len(surface.layer)
    assert found.pictures["attention_maps_1"].arrays["maps"].shape == (min(4, spec.depth), 2, *spec.grid)


def test_rows_of_heads_belong_to_their_heads(eight):
    encoder, batch, _ = eight
    rows = []

    class Kept(HeadSimilarity):
        def describe(self, found):
            rows.append(found["outputs"])
            return super().describe(found)

    found = measure(encoder, [batch], {"kept": Kept(encoder.spec)}, range(10, 18))
    assert rows[0].shape == (8, 3, 3)
    torch.testing.assert_close(torch.tensor(found.curves["head_similarity"].heads), rows[0].mean(0).float())
