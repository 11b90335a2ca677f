"""Files in the layouts of other projects: the features of their networks and every tensor accounted for, or refused."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F

from harmonize.checkpoints.official import build, interpret, kind_of, read_official
from harmonize.checkpoints.reading import read_file
from harmonize.types import IMAGE_MEAN, IMAGE_STD, ConfigError
from tests.checkpoints.layouts import (
    SIZES,
    beit,
    beit_state,
    hugging_face,
    perturbed,
    prefixed,
    training,
    vit,
)

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def save(tmp_path):
    def write(content, name="a.pth", **options):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        else:
            torch.save(content, path, **options)
        return str(path)

    return write


def images(size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def classify(head, tokens, num_prefix):
    """As evaluation does it with a file's classifier."""
    pooled = tokens[:, 0] if head.pool == "cls" else tokens[:, num_prefix:].mean(dim=1)
    if head.norm is not None:
        pooled = F.layer_norm(pooled, pooled.shape[1:], *head.norm, eps=1e-6)
    return pooled @ head.weight.T + head.bias


def normalised_as_in(official, ours):
    """The same images, normalised as the file's were."""
    mean, std, our_mean, our_std = (
        torch.tensor(values)[:, None, None] for values in (official.mean, official.std, IMAGE_MEAN, IMAGE_STD)
    )
    return (ours * our_std + our_mean - mean) / std


@torch.no_grad()
def assert_same(official, model, size=32):
    """The same tokens as timm's model and, where the file holds a classifier, the same class scores."""
    encoder = build(official)
    assert not encoder.training
    tokens = encoder(images(size))
    theirs = model.forward_features(normalised_as_in(official, images(size)))
    torch.testing.assert_close(tokens, theirs, rtol=1e-4, atol=2e-5)
    if official.head is not None:
        scores = classify(official.head, tokens, encoder.num_prefix_tokens)
        torch.testing.assert_close(scores, model.forward_head(theirs), rtol=1e-4, atol=2e-5)
        assert f"linear classifier head found ({len(scores[0])} classes" in official.note


def assert_accounted_for(official, content):
    """One row per tensor and per entry without weights, none of them unexplained."""
    expected = set()
    for entry, value in content.items():
        if isinstance(value, dict) and any(isinstance(inner, torch.Tensor) for inner in value.values()):
            expected |= {(entry, key) for key in value}
        else:
            expected.add(("", entry))
    if "ibot_loss" in content:
        expected = {row for row in expected if row[0] != "ibot_loss"} | {("", "ibot_loss")}
    assert {(row.entry, row.key) for row in official.keys} == expected
    assert len(official.keys) == len(expected)
    assert {row.outcome for row in official.keys} <= {"mapped", "dropped"}
    assert all(row.detail for row in official.keys)


# Family -> the file's content, its network, and what more is known. One entry per layout.
def ibot():
    teacher, student = vit(), perturbed(vit())
    head = {"mlp.0.weight": torch.ones(8, 192), "last_layer2.weight_v": torch.ones(4, 8)}
    content = training(
        {
            "student": prefixed("module.backbone.", dict(student.state_dict()) | {"masked_embed": torch.ones(1, 192)})
            | prefixed("module.head.", head),
            "teacher": prefixed("backbone.", teacher.state_dict()) | prefixed("head.", head),
            "ibot_loss": {"center": torch.ones(1, 8)},
            "fp16_scaler": {"scale": 2.0},
        }
    )
    return content, teacher


def mae_linear():
    model = vit("sincos_mae")
    norm = nn.BatchNorm1d(192, affine=False, eps=1e-6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    linear = nn.Linear(192, 5)
    model.head = nn.Sequential(norm, linear).eval()
    return training({"model": dict(model.state_dict())}), model


def moco_linear():
    model = vit("sincos", embed_dim=384, depth=1, num_heads=12, num_classes=5)
    content = {"epoch": 90, "arch": "vit_small", "best_acc1": torch.tensor(70.0)}
    return content | {"state_dict": prefixed("module.", model.state_dict())}, model


def beit_pretrained(entry="model"):
    model = beit(shared=True)
    extra = {"mask_token": torch.ones(1, 1, 192), "lm_head.weight": torch.ones(7, 192), "lm_head.bias": torch.ones(7)}
    return {entry: beit_state(model) | extra}, model


def beit_fine_tuned():
    model = beit(shared=False, classes=5)
    return {"model": beit_state(model)}, model


def simmim_fine_tuned():
    content, model = beit_fine_tuned()
    return content | {"max_accuracy": 83.8, "lr_scheduler": {"t": 1}, "amp": {}, "epoch": 99}, model


def plain(entry=None, **options):
    def make():
        model = vit(**options)
        return {entry: dict(model.state_dict())} if entry else dict(model.state_dict()), model

    return make


def mae_with_decoder():
    model = vit("sincos_mae")
    extra = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    extra |= {"decoder_embed.weight": torch.ones(8, 192), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    return training({"model": dict(model.state_dict()) | extra}), model


def distilled():
    torch.manual_seed(0)
    model = perturbed(VisionTransformerDistilled(**SIZES, num_classes=5))
    return {"model": dict(model.state_dict())}, model


def simmim(**options):
    """SimMIM's encoder; without options as in its recipe, which has relative positions and LayerScale only."""

    def make():
        model = beit(shared=not options, **options)
        encoder = prefixed("encoder.", beit_state(model)) | {"encoder.mask_token": torch.ones(1, 1, 192)}
        decoder = {"decoder.0.weight": torch.ones(192, 192, 1, 1), "decoder.0.bias": torch.ones(192)}
        config = {"MODEL": {"TYPE": "vit", "VIT": {"NUM_HEADS": 3}, "SWIN": {"NUM_HEADS": [4, 8]}}}
        return training({"model": encoder | decoder, "config": config}), model

    return make


def hugging_face_mae():
    model = vit("sincos_mae")
    decoder = {"decoder.mask_token": torch.ones(1, 1, 8), "decoder.decoder_pos_embed": torch.ones(1, 17, 8)}
    return hugging_face(model) | decoder, model


def transformers(**options):
    def make():
        model = vit(**options)
        extra = {} if options else {"pooler.dense.weight": torch.ones(192, 192)}
        return hugging_face(model, "vit." if options else "") | extra, model

    return make


LAYOUTS = {
    "iBOT, pre-trained": ibot,
    "iBOT, backbone": plain("state_dict"),
    "DINO or timm, backbone": plain(),
    "timm or DeiT, classifier": plain("model", num_classes=5),
    "MAE, backbone": plain("model", positions="sincos_mae", embed_dim=768, num_heads=12, depth=1),
    "MAE, pre-trained": mae_with_decoder,
    "MAE, fine-tuned": plain("model", global_pool="avg", num_classes=5),
    "MAE, linear probe": mae_linear,
    "MoCo v3, linear probe": moco_linear,
    "MoCo v3, backbone": plain("state_dict", positions="sincos"),
    "SimMIM, pre-trained": simmim(),
    "BEiT, pre-trained": beit_pretrained,
    "BEiT, fine-tuned": beit_fine_tuned,
    "SimMIM, fine-tuned": simmim_fine_tuned,
    "Hugging Face ViT": transformers(),
}
# Families that publish no model of the width 192 -> the caller gives the head count (3).
GIVEN = {"MAE, pre-trained", "MAE, fine-tuned", "MAE, linear probe", "MoCo v3, backbone"}


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_layout(save, family):
    content, model = LAYOUTS[family]()
    official = read_official(save(content), num_heads=3 if family in GIVEN else None)
    assert official.family == family
    assert_same(official, model)
    assert_accounted_for(official, content)
    assert (official.heads_from == "given") is (family in GIVEN)
    assert official.mean == official.std == HALF if family.startswith("BEiT") else official.mean == IMAGE_MEAN


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda: beit_pretrained("module"), "BEiT, pre-trained"),  # DeepSpeed's entry
        (simmim(use_rel_pos_bias=False, use_abs_pos_emb=True, init_values=None), "SimMIM, pre-trained"),
        (transformers(num_classes=5), "Hugging Face ViT"),
        (hugging_face_mae, "Hugging Face ViT"),
        (plain("model", class_token=True, init_values=0.1), "DINO or timm, backbone"),
        (plain("model", reg_tokens=4, no_embed_class=True, num_classes=5), "timm or DeiT, classifier"),
        (plain("model", reg_tokens=4), "DINO or timm, backbone"),
        (plain(num_classes=5, embed_dim=384, num_heads=6, depth=1), "timm or DeiT, classifier"),
    ],
)
def test_variants(save, make, family):
    content, model = make()
    official = read_official(save(content))
    assert official.family == family
    assert_same(official, model)
    assert_accounted_for(official, content)


def test_timm_safetensors(save):
    for model in (vit(num_classes=5), beit(shared=False, classes=5)):
        official = read_official(save(model.state_dict(), "a.safetensors"))
        assert official.head is not None
        assert_same(official, model)


def test_the_distillation_token_is_a_register(save):
    content, model = distilled()
    official = read_official(save(content))
    with torch.no_grad():
        tokens = build(official)(images())
        torch.testing.assert_close(tokens, model.forward_features(images()), rtol=1e-4, atol=1e-5)
    assert {row.key for row in official.keys if row.outcome == "dropped"} == {"head_dist.weight", "head_dist.bias"}
    assert official.head.weight.equal(content["model"]["head.weight"])


def test_half_precision(save):
    model = vit("sincos_mae", embed_dim=768, num_heads=12, depth=1)
    official = read_official(save({"model": {key: value.half() for key, value in model.state_dict().items()}}))
    assert official.family == "MAE, backbone"
    assert {weight.dtype for weight in official.weights.values()} == {torch.float32}


def test_building_leaves_the_random_numbers_alone(save):
    official = read_official(save(vit().state_dict()))
    torch.manual_seed(5)
    build(official)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.rand(3).equal(after)


def test_what_lies_beside_the_weights_is_one_row_each(save):
    content, _ = LAYOUTS["MAE, pre-trained"]()
    official = read_official(save(content), num_heads=3)
    beside = {row.key: row for row in official.keys if not row.entry}
    assert beside.keys() == {"optimizer", "epoch", "args"}
    assert {row.outcome for row in beside.values()} == {"dropped"}
    assert beside["optimizer"].detail == "the optimiser's state"


def test_merged_biases_have_no_key_part(save):
    content, model = beit_pretrained()
    official = read_official(save(content))
    bias = official.weights["blocks.1.attn.qkv.bias"]
    assert bias[:192].equal(model.blocks[1].attn.q_bias)
    assert not bias[192:384].any()
    details = {row.key: row.detail for row in official.keys}
    assert details["blocks.1.attn.q_bias"] == "blocks.1.attn.qkv.bias (q)"
    assert details["blocks.1.gamma_2"] == "blocks.1.ls2.gamma"


# The number of heads


def test_heads_of_moco_v3_are_twelve(save):
    content, _ = moco_linear()
    official = read_official(save(content))
    assert official.architecture["num_heads"] == 12
    assert official.heads_from == "MoCo v3's vits.py: 12 for every size"
    assert "no file of the pre-training; linear classifier head found (5 classes, on the class token)" in official.note


def test_a_lonely_vit_small_with_fixed_positions_could_have_6_or_12(save):
    state = vit("sincos", embed_dim=384, depth=1, num_heads=12).state_dict()
    assert "give it as num_heads=N" in sentence(save(state))


def test_heads_from_the_table(save):
    path = save(beit_pretrained()[0])
    official = read_official(path)
    assert (official.architecture["num_heads"], official.heads_from) == (3, "relative-position table")
    with pytest.raises(ConfigError, match=r"num_heads=4 must be 3, as the relative-position table of checkpoint="):
        read_official(path, num_heads=4)


@pytest.mark.parametrize(
    ("beside", "place"),
    [
        ({"args": Namespace(num_heads=6)}, "args.num_heads"),
        ({"config": {"MODEL": {"VIT": {"NUM_HEADS": 6}}}}, "config.MODEL.VIT.NUM_HEADS"),
    ],
)
def test_heads_from_the_file(save, beside, place):
    official = read_official(save({"model": dict(vit().state_dict())} | beside))
    assert (official.architecture["num_heads"], official.heads_from) == (6, f"the file's {place}")


def test_heads_and_normalisation_from_the_json_beside(save, tmp_path):
    path = save(vit(num_classes=5).state_dict(), "model.safetensors")
    pretrained = '"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}'
    (tmp_path / "config.json").write_text(f'{{"model_args": {{"num_heads": 6}}, {pretrained}}}')
    official = read_official(path)
    assert (official.architecture["num_heads"], official.mean, official.std) == (6, HALF, (0.25, 0.5, 0.5))
    other = read_official(save(vit().state_dict(), "other.safetensors"))  # another's config.json says nothing of it
    assert (other.architecture["num_heads"], other.mean) == (3, IMAGE_MEAN)
    (tmp_path / "config.json").write_text("{")
    assert "config.json beside it is no JSON file" in sentence(path)


def test_unpublished_widths_are_asked_for(save):
    path = save(vit(embed_dim=48, num_heads=3).state_dict())
    assert sentence(path) == (
        f"checkpoint={path} (DINO or timm, backbone): the number of heads of an encoder of width 48 is neither in the "
        "file nor published; give it as num_heads=N."
    )
    official = read_official(path, num_heads=3)
    assert official.heads_from == "given"
    assert_same(official, vit(embed_dim=48, num_heads=3))
    for wrong in (5, 0, -3):
        assert f"num_heads={wrong} must divide the width 48" in sentence(path, num_heads=wrong)


# Branches


def test_teacher_and_student(save):
    content, teacher = ibot()
    path = save(content)
    weights = {branch: read_official(path, branch=branch).weights for branch in ("auto", "teacher", "student")}
    name = "blocks.0.mlp.fc1.weight"
    assert weights["auto"][name].equal(teacher.state_dict()[name])
    assert weights["teacher"][name].equal(weights["auto"][name])
    assert weights["student"][name].equal(content["student"][f"module.backbone.{name}"])
    assert "branch=momentum must be auto, teacher, student" in sentence(path, branch="momentum")
    del content["teacher"]
    assert "the student encoder" in read_official(save(content)).note


def test_a_file_with_one_encoder_has_no_branches(save):
    assert "branch=base must be auto" in sentence(save(vit().state_dict()), branch="base")


# Other image sizes


@pytest.mark.parametrize("method", ["mae", "timm"])
def test_another_image_size(save, method):
    model = vit()
    official = read_official(save(model.state_dict()), image_size=48, resize=method)
    larger = vit(img_size=48)
    state = dict(model.state_dict())
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [6, 6], antialias=method == "timm")
    larger.load_state_dict(state)
    assert_same(official, larger, 48)
    assert official.architecture["image_size"] == 48
    assert "positions adapted from 4 x 4 patches to 6 x 6" in official.note


def test_relative_positions_at_another_image_size(save):
    model = beit(shared=False, classes=5)
    official = read_official(save({"model": beit_state(model)}), image_size=48)
    model.set_input_size((48, 48))  # timm's resampling
    assert_same(official, model, 48)


def test_fixed_positions_are_computed_anew(save):
    path = save(vit("sincos").state_dict())
    official = read_official(path, image_size=64, num_heads=3)
    encoder = build(official)
    fixed = type(encoder)(64, 8, 192, 1, 3, positions="sincos").pos_embed
    assert encoder.pos_embed.equal(fixed)
    assert not encoder.pos_embed.requires_grad


@pytest.mark.parametrize("size", [0, -8, 20])
def test_impossible_sizes(save, size):
    text = sentence(save(vit().state_dict()), image_size=size)
    assert text.startswith(f"image_size={size} must be a multiple of the patch size 8 of checkpoint=")


def test_an_unknown_method(save):
    text = sentence(save(vit().state_dict()), resize="nearest")
    assert text == "resize=nearest must be one of mae, timm, dino."


def test_no_positions_at_all(save):
    state = {key: value for key, value in vit().state_dict().items() if key != "pos_embed"}
    assert "give image_size=N." in sentence(save(state))
    official = read_official(save(state), image_size=40)
    assert official.architecture["positions"] == "none"
    assert build(official)(images(40)).shape == (3, 26, 192)


# What is refused


def sentence(path, **options):
    with pytest.raises(ConfigError) as error:
        read_official(path, **options)
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_another_architecture(save):
    state = prefixed("module.", ResNet(BasicBlock, (1, 1, 1, 1)).state_dict())
    path = save({"state_dict": state})
    assert sentence(path).startswith(
        f"checkpoint={path} holds no Vision Transformer of a known layout: none of its {len(state)} tensors "
        "(state_dict/module.conv1.weight, "
    )
    swin = {"patch_embed.proj.weight": torch.ones(96, 3, 4, 4), "layers.0.blocks.0.norm1.weight": torch.ones(96)}
    assert "there are 0 blocks named blocks.N" in sentence(save({"model": swin}))
    assert "(there are none)" in sentence(save({"epoch": 3}))
    stem = {"module.base_encoder.patch_embed.proj.0.weight": torch.ones(8, 3, 3, 3)}
    assert "MoCo v3's vit_conv_small" in sentence(save({"state_dict": stem}))
    lost = prefixed("trunk.", vit().state_dict())
    assert "an encoder where no known layout has one (trunk.patch_embed.proj.weight)" in sentence(save(lost))


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_tensor_too_many(save, family):
    content, _ = LAYOUTS[family]()
    entry = next((key for key in ("teacher", "model", "state_dict") if key in content), None)
    (content[entry] if entry else content)["strange.weight"] = torch.ones(2)
    shown = f"{entry}/strange.weight" if entry else "strange.weight"
    path = save(content)
    assert sentence(path, num_heads=3 if family in GIVEN else None) == (
        f"checkpoint={path} ({family}) is refused because of its tensors, 1 is not explained ({shown})."
    )


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_tensor_missing(save, family):
    content, _ = LAYOUTS[family]()
    for state in (content, *content.values()):
        if isinstance(state, dict):
            for key in [key for key in state if key.endswith(("mlp.fc1.bias", ".0.intermediate.dense.bias"))]:
                del state[key]
    text = sentence(save(content), num_heads=3 if family in GIVEN else None)
    assert "missing (blocks.0.mlp.fc1.bias" in text
    assert "explained" not in text


def test_many_wrong_tensors_are_counted_and_some_named(save):
    state = dict(vit().state_dict()) | {f"extra.{i}": torch.ones(1) for i in range(5)}
    state["blocks.0.mlp.fc1.weight"] = torch.ones(100, 192)  # not four times the width
    del state["norm.bias"]
    assert sentence(save(state)).endswith(
        "6 are not explained (blocks.0.mlp.fc1.weight, extra.0, extra.1, ...) and 1 is missing (norm.bias)."
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pos_embed": torch.ones(1, 19, 192)}, "position embeddings of shape (1, 19, 192), which fit no square grid"),
        ({"pos_embed": torch.ones(17, 192)}, "fit no square grid"),
        ({"patch_embed.proj.weight": torch.ones(192, 3)}, "has shape (192, 3)"),
        ({"patch_embed.proj.weight": torch.ones(192, 1, 8, 8)}, "1 is not explained (patch_embed.proj.weight)"),
        ({"cls_token": torch.ones(1, 1, 7)}, "1 is not explained (cls_token)"),
        ({"blocks.900000000.norm1.weight": torch.ones(192)}, "1 is not explained"),
        ({"rel_pos_bias.relative_position_bias_table": torch.ones(7)}, "table of shape (7,)"),
        ({"rel_pos_bias.relative_position_bias_table": torch.ones(7, 3)}, "1 is not explained"),
        ({"mask_token_2": torch.ones(192)}, "1 is not explained (mask_token_2)"),
        ({"head.weight": torch.ones(5, 192)}, "incomplete classifier (head.weight)"),
        ({"head.weight": torch.ones(5, 19), "head.bias": torch.ones(5)}, "head.weight has shape (5, 19), not (5, 192)"),
    ],
)
def test_shapes_that_do_not_fit(save, wrong, message):
    assert message in sentence(save(dict(vit().state_dict()) | wrong))


@pytest.mark.parametrize("bias", [torch.tensor(1.0), torch.ones(3, 3)])
def test_parts_that_do_not_fit(save, bias):
    content, _ = beit_pretrained()
    content["model"]["blocks.0.attn.q_bias"] = bias
    assert "1 is missing (blocks.0.attn.qkv.bias)" in sentence(save(content))


def test_an_index_of_another_order(save):
    content, _ = beit_pretrained()
    content["model"]["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    assert "1 is not explained (model/rel_pos_bias.relative_position_index)" in sentence(save(content))


def test_tensors_in_an_unknown_entry(save):
    path = save({"model": dict(vit().state_dict()), "queue": [torch.ones(3)]})
    assert "1 is not explained (queue)" in sentence(path)
    path = save({"model": dict(vit().state_dict()), "generator": {"weight": torch.ones(3)}})
    assert "1 is not explained (generator/weight)" in sentence(path)


# Whose file


def test_harmonize_s_own_files(save, tmp_path):
    own = save({"state_dict": prefixed("encoder.", vit().state_dict()), "config": {"backbone": {}}}, "own.ckpt")
    exported = tmp_path / "encoder.safetensors"
    save_file({"cls_token": torch.ones(1)}, exported, metadata={"architecture": "{}", "fingerprint": "[]"})
    kinds = {own: "own", str(exported): "exported", save(vit().state_dict()): "official"}
    for path, kind in kinds.items():
        assert kind_of(read_file(path)) == kind
    for path in (own, str(exported)):
        assert "is harmonize's own" in sentence(path)


def test_a_file_is_read_once(save):
    file = read_file(save(vit().state_dict()))
    assert interpret(file).weights.keys() == vit().state_dict().keys()
