import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.data.cue_conflict import CATEGORIES, ConflictImages, ConflictingShapes, CueConflict, is_imagenet1k
from harmonize.data.datasets import Split
from harmonize.data.shapes import HELD_OUT, NUM_KINDS, SHAPES, TEXTURES, Shapes
from harmonize.types import ConfigError

IMAGENET = ["n01440764", *(f"n0{2_000_000 + i}" for i in range(998)), "n15075141"]


def save(root, *names):
    for name in names:
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (224, 224), (len(name), 0, 0)).save(path)


@pytest.mark.parametrize("inside", [False, True])
def test_the_folder_of_model_vs_human(tmp_path, inside):
    root = tmp_path / "cue-conflict" if inside else tmp_path
    save(root, "airplane/airplane1-bicycle2", "airplane/airplane10-airplane3", "truck/truck4-knife1")
    data = CueConflict(str(tmp_path), IMAGENET)
    assert isinstance(data, ConflictImages)
    assert isinstance(data, Split)
    assert data.shared
    assert data.shape_classes == data.texture_classes == list(CATEGORIES)
    names = [
        (data.shape_classes[s], data.texture_classes[t])
        for s, t in zip(data.shape_labels, data.texture_labels, strict=True)
    ]
    assert sorted(names) == [("airplane", "airplane"), ("airplane", "bicycle"), ("truck", "knife")]
    again = pickle.loads(pickle.dumps(data))
    for index in range(3):
        image, label = again.load(index)
        assert (image.mode, image.size, label) == ("RGB", (224, 224), data.shape_labels[index])
        assert image.getpixel((0, 0))[0] == len("/".join(data.name(index)[:-4].split("/")[-2:]))


def test_the_mapping_is_the_mean_over_members(tmp_path):
    save(tmp_path, "cat/cat1-dog2")
    data = CueConflict(str(tmp_path), IMAGENET)
    assert data.weights.shape == (16, 1000)
    torch.testing.assert_close(data.weights.sum(1), torch.ones(16))
    probabilities = torch.rand(5, 1000, generator=torch.Generator().manual_seed(0)).softmax(1)
    mapped = probabilities @ data.weights.T
    for row, (_, members) in enumerate(CATEGORIES.items()):
        torch.testing.assert_close(mapped[:, row], probabilities[:, members].mean(1))


def test_the_members_of_the_sixteen_classes():
    """207 of the 1,000 classes, each in one of the 16 (Geirhos et al. 2018, section 2.2)."""
    members = [number for numbers in CATEGORIES.values() for number in numbers]
    assert len(CATEGORIES) == 16
    assert len(members) == len(set(members)) == 207
    assert list(CATEGORIES) == sorted(CATEGORIES)
    assert CATEGORIES["boat"] == [472, 554, 625, 814, 914]
    assert CATEGORIES["bottle"] == [440, 720, 737, 898, 899, 901, 907]
    assert set(range(152, 269)) - set(CATEGORIES["dog"]) == {192, 204, 227, 242, 251, 258, 260, 264}
    assert len(CATEGORIES["bird"]) == 49


def test_imagenet_is_known_by_its_names_in_their_order():
    assert is_imagenet1k(IMAGENET)
    assert not is_imagenet1k(IMAGENET[:100])
    assert not is_imagenet1k(IMAGENET[::-1])
    assert not is_imagenet1k([f"class{i:04d}" for i in range(1000)])
    assert not is_imagenet1k(["n01440765", *IMAGENET[1:]])


@pytest.mark.parametrize(
    "classes", [["cat", "cat-fish", "dog2"], ["n01440764", "n01443537", "n014407641"], list(CATEGORIES)]
)
def test_classes_of_the_head_itself(tmp_path, classes):
    a, b, c = classes[:3]
    save(tmp_path, f"{a}/{a}1-{b}22", f"{b}/{b}3-{c}4", f"{c}/{c}5-{a}6")
    data = CueConflict(str(tmp_path), classes)
    assert sorted(zip(data.shape_labels, data.texture_labels, strict=True)) == [(0, 1), (1, 2), (2, 0)]
    assert data.shape_classes == classes
    assert torch.equal(data.weights, torch.eye(len(classes)))


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^eval.root=null is not possible: give the folder cue-conflict of model-vs"):
        CueConflict(None, IMAGENET)
    with pytest.raises(ConfigError, match=r"^eval.root=/nowhere does not exist"):
        CueConflict("/nowhere", IMAGENET)
    with pytest.raises(ConfigError, match=r"holds no image in .*airplane/airplane1-bicycle2.png, is needed"):
        CueConflict(str(tmp_path), IMAGENET)
    save(tmp_path, "cat/cat1-dog2")
    needed = "the classes of model-vs-human need one over the 1,000 classes of ImageNet-1k in WNID order, others must"
    with pytest.raises(ConfigError, match=rf"cat/cat1-dog2.png, which is not .*: {needed} be named like its own 100"):
        CueConflict(str(tmp_path), IMAGENET[:100])
    for wrong in ("cat/dog1-cat2", "cat/cat-dog", "cat/cat1-wolf2", "cat1-dog2"):
        root = tmp_path / wrong.replace("/", "_")
        save(root, wrong)
        with pytest.raises(ConfigError, match=rf"holds {wrong}.png, which is not SHAPE/SHAPE1-TEXTURE2"):
            CueConflict(str(root), IMAGENET)


@pytest.mark.parametrize("label", ["shape", "texture"])
def test_conflicting_shapes(label):
    dataset = Shapes(num_train=60, num_val=36, image_size=32, label=label)
    data = ConflictingShapes(dataset)
    assert isinstance(data, ConflictImages)
    assert not data.shared
    assert (data.shape_classes, data.texture_classes) == (SHAPES, TEXTURES)
    assert len(data) == 36
    assert set((data.texture_labels - data.shape_labels) % NUM_KINDS) == set(HELD_OUT)
    conflict = dataset.split("conflict")
    data.prepare()
    for index in range(12):
        image, shape = data.load(index)
        assert np.array_equal(image, conflict.load(index)[0])
        assert (shape, data.texture_labels[index]) == conflict.factors(index)
        assert data.name(index) == conflict.name(index)
    for name, num in (("train", 60), ("val", 36)):
        shapes, textures = data.training_factors(name)
        assert (len(shapes), shapes.dtype) == (num, torch.int64)
        assert [(int(s), int(t)) for s, t in zip(shapes, textures, strict=True)] == [
            dataset.split(name).factors(i) for i in range(num)
        ]
    with pytest.raises(ConfigError, match=r"data has no images with conflicting cues: data=shapes has, or eval.root"):
        ConflictingShapes(object())
