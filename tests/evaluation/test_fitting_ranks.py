"""1 rank == 2 ranks: training, fine-tuning and segmentation end in the same weights and numbers."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from harmonize.evaluation.fine_tune import Classifier, FineTune, class_scores
from harmonize.evaluation.segmentation import LinearHead, Segmentation, image_counts
from harmonize.functional.distributed import rank, world_size
from tests.evaluation import test_fine_tune, test_segmentation
from tests.evaluation.test_fitting import Batches, large_eps, train


def fit(folder):
    data = Batches(rank=rank(), world=world_size())
    fitted = train(folder, data=data, ema=0.5, clip=0.5, lr=1e-3)
    weights = fitted.network.state_dict() | {f"average.{n}": x for n, x in fitted.average.state_dict().items()}
    return weights | {"losses": torch.tensor(fitted.losses)}


def fine_tune(folder):
    """With noise in the images; 31 of them are scored, an odd number."""
    kept = []
    bench = test_fine_tune.make_bench(folder, num_val=31, keep=lambda *parts: kept.append(Classifier(*parts)))
    (row,) = FineTune(**test_fine_tune.EASY | {"erasing_prob": 0.5}).run(bench)
    assert row.num_images == 31
    scores, labels = class_scores(bench, kept[0].encoder, kept[0].head, bench.data)
    return {"top1": torch.tensor(row.value), "scores": scores, "labels": labels}


def plain_head(*sizes):
    """Without BatchNorm, whose batch is that of a rank on a CPU, and without dropout."""
    head = LinearHead(*sizes, dropout=0.0)
    head.norm = torch.nn.Identity()
    return head


def segmentation(folder):
    """Of 11 images of two sizes."""
    bench = test_segmentation.make_bench(folder, num_val=11)
    protocol = Segmentation(**test_segmentation.EASY | {"decode_head": plain_head, "epochs": 1})
    assert protocol.run(bench)[0].num_images == 11
    masks = test_segmentation.Halves()
    network, data = protocol._network(bench, 3).eval(), protocol._module(bench, masks)
    trained = bench.load_state("segmentation")["network"]
    return trained | {"counts": image_counts(bench, network, data, 3)}


JOBS = {"fit": fit, "fine_tune": fine_tune, "segmentation": segmentation}


def work(number, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    with large_eps():
        torch.save({name: job(f"{folder}/{name}") for name, job in JOBS.items()}, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in (0, 1)]


@pytest.mark.parametrize("name", JOBS)
@large_eps()
def test_two_ranks_equal_one(name, found, tmp_path):
    whole = JOBS[name](tmp_path)
    for ranks in found:
        assert set(ranks[name]) == set(whole)
        for key, value in whole.items():
            assert torch.equal(ranks[name][key], found[0][name][key]), key
            torch.testing.assert_close(ranks[name][key], value, rtol=1e-3, atol=1e-4, msg=key)
