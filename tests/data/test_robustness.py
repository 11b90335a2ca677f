import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from harmonize.data.datasets import Split
from harmonize.data.module import DataModule
from harmonize.data.robustness import CORRUPTIONS, Robustness
from harmonize.types import ConfigError

CLASSES = ["n01440764", "n01443537", "n01484850", "n02123045"]


def save(root, *names, ending="JPEG"):
    for name in names:
        path = root / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (len(name), 0, 0)).save(path)


@pytest.fixture
def corrupted(tmp_path):
    """ImageNet-C: validation images of every class by corruption and severity."""
    for corruption in ("gaussian_noise", "zoom_blur", "my_own"):
        for severity in (1, 3):
            for name in CLASSES:
                save(tmp_path, f"{corruption}/{severity}/{name}/ILSVRC2012_val_{severity:08d}")
    return tmp_path


def where(conditions):
    return [(condition.name, condition.group, condition.severity) for condition in conditions]


def test_imagenet_c(corrupted):
    data = Robustness(str(corrupted), CLASSES)
    assert where(data.conditions) == [
        ("gaussian_noise", "noise", 1),
        ("gaussian_noise", "noise", 3),
        ("my_own", "", 1),
        ("my_own", "", 3),
        ("zoom_blur", "blur", 1),
        ("zoom_blur", "blur", 3),
    ]
    assert data.present == [0, 1, 2, 3]
    assert data.corrupted
    split = pickle.loads(pickle.dumps(data.conditions[1].split))
    assert isinstance(split, Split)
    assert split.labels.tolist() == [0, 1, 2, 3]
    image, label = split.load(2)
    assert (image.size, label) == ((16, 12), 2)
    assert split.name(2).endswith("gaussian_noise/3/n01484850/ILSVRC2012_val_00000003.JPEG")


def test_imagenet_c_with_groups(corrupted):
    for corruption, group in (("gaussian_noise", "noise"), ("zoom_blur", "blur"), ("my_own", "mine")):
        (corrupted / group).mkdir()
        (corrupted / corruption).rename(corrupted / group / corruption)
    data = Robustness(str(corrupted), CLASSES)
    assert where(data.conditions)[:3] == [
        ("gaussian_noise", "noise", 1),
        ("gaussian_noise", "noise", 3),
        ("my_own", "mine", 1),
    ]
    assert len(data.conditions) == 6
    assert data.conditions[5].split.labels.tolist() == [0, 1, 2, 3]


def test_fifteen_corruptions_and_four_more():
    assert sum(len(names) for group, names in CORRUPTIONS.items() if group != "extra") == 15
    assert len(CORRUPTIONS["extra"]) == 4


def test_imagenet_r_has_some_of_the_classes(tmp_path):
    save(tmp_path / "imagenet-r", "n02123045/art_0", "n02123045/cartoon_1", "n01443537/toy_0", ending="jpg")
    (tmp_path / "imagenet-r" / "README.txt").write_text("no class")
    data = Robustness(str(tmp_path / "imagenet-r"), CLASSES)
    (condition,) = data.conditions
    assert (condition.name, condition.group, condition.severity) == ("imagenet-r", "", None)
    assert condition.split.labels.tolist() == [1, 3, 3]
    assert data.present == [1, 3]
    assert not data.corrupted


def test_stylized_imagenet_is_seen_in_its_val_folder(tmp_path):
    save(tmp_path, "train/n01440764/a", "train/n02123045/b", "val/n02123045/c", "val/n02123045/d", ending="png")
    data = Robustness(str(tmp_path), CLASSES)
    assert [condition.split.labels.tolist() for condition in data.conditions] == [[3, 3]]
    assert data.present == [3]


@pytest.mark.parametrize("layout", ["{c}/a", "val/{c}/a", "fog/2/{c}/a", "weather/fog/2/{c}/a"])
def test_classes_that_are_numbers_are_no_severities(tmp_path, layout):
    for name in "0123":
        save(tmp_path, layout.format(c=name))
    (condition,) = Robustness(str(tmp_path), list("0123")).conditions
    assert condition.split.labels.tolist() == [0, 1, 2, 3]
    assert condition.severity == (2 if "fog" in layout else None)


def test_an_empty_class_folder_is_not_present(tmp_path):
    save(tmp_path, "n01443537/a")
    (tmp_path / "n01440764").mkdir()
    data = Robustness(str(tmp_path), CLASSES)
    assert data.present == [1]
    assert data.conditions[0].split.labels.tolist() == [1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_conditions_go_through_the_data_module(corrupted, num_workers):
    condition, seen = Robustness(str(corrupted), CLASSES).conditions[0], []
    for rank in (0, 1):
        data = DataModule(Few(), {}, {}, 8, 2, world_size=2, rank=rank, num_workers=num_workers)
        for batch in data.loader_of(condition.split, 1, eval_crop=1.0):
            assert batch.image.shape == (1, 3, 8, 8)
            assert torch.equal(batch.label, batch.index)
            seen += batch.index.tolist()
    assert sorted(seen) == [0, 1, 2, 3]


class Few:
    classes = CLASSES

    def split(self, name):
        return np.zeros(4)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^eval.root=null is not possible: give the folder of a robustness set, as"):
        Robustness(None, CLASSES)
    with pytest.raises(ConfigError, match=r"^eval.root=/nowhere does not exist: .*CORRUPTION/SEVERITY/CLASS"):
        Robustness("/nowhere", CLASSES)
    with pytest.raises(ConfigError, match=r"has no class folders in .*ImageNet-C.*ImageNet-R.*Stylized"):
        Robustness(str(tmp_path), CLASSES)
    save(tmp_path, "n01440764/a", "n09999999/b", "tiger/c")
    with pytest.raises(
        ConfigError, match=r"has 2 folders in .* not among the 4 classes of the head, such as n09999999: .*WNID"
    ):
        Robustness(str(tmp_path), CLASSES)
    (tmp_path / "empty" / "n01440764").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^eval.root holds no image in the class folders of .*empty"):
        Robustness(str(tmp_path / "empty"), CLASSES).conditions[0].split  # noqa: B018
    save(tmp_path / "c", "fog/1/n01440764/a", "fog/2/tench/a")
    with pytest.raises(ConfigError, match=r"has 1 folders in .*fog/2 that are not among .* such as tench"):
        Robustness(str(tmp_path / "c"), CLASSES)
