"""Teachers: their own normalisation, their own sizes, and maps before the last norm."""

import pytest
import torch
import torch.nn.functional as F

from mtcl import UserError
from mtcl.models.teachers import Teacher, build_teacher, read_teacher_channels, renormalize, round_to_multiple

SAM = {"depth": 4, "embed_dim": 24, "num_heads": 2, "global_attn_indexes": (1, 3)}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_teacher(name, **options) -> Teacher:
    torch.manual_seed(0)
    return build_teacher(name, **options)


def test_a_vit_gives_the_tokens_of_its_blocks_without_its_last_norm():
    teacher, image = make_teacher("test_vit"), make_image(2, 3, 32, 48)
    vit, tokens = teacher.backbone.net.model, []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, output: tokens.append(output))
    maps = teacher(image, teacher.backbone.mean, teacher.backbone.std)
    chosen = [tokens[index] for index in teacher.backbone.net.feature_info.out_indices]
    for m, expected in zip(maps, chosen, strict=True):
        assert torch.equal(m, expected[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, (2, 3)))


def test_images_are_renormalised_to_the_teacher_s_colours():
    raw = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(a)[:, None, None], torch.tensor(b)[:, None, None])
        for a, b in ((MEAN, STD), ([0.5] * 3, [0.1] * 3))
    )
    got = renormalize((raw - mean) / std, (MEAN, STD), ([0.5] * 3, [0.1] * 3))
    torch.testing.assert_close(got, (raw - own_mean) / own_std)
    teacher = make_teacher("test_resnet")
    backbone = teacher.backbone
    want = teacher((raw.repeat(1, 1, 8, 8) - 0.5) / 0.5, (0.5,) * 3, (0.5,) * 3)
    assert tuple(backbone.mean) == (0.5, 0.5, 0.5)
    got = teacher((raw.repeat(1, 1, 8, 8) - mean) / std, MEAN, STD)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sides_go_to_the_nearest_multiple_of_a_patch():
    assert [round_to_multiple(side, 14) for side in (448, 576, 3, 21)] == [448, 574, 14, 28]
    teacher, image = make_teacher("test_vit"), make_image(1, 3, 40, 57)
    sizes = []
    teacher.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    maps = teacher(image, teacher.backbone.mean, teacher.backbone.std)
    assert sizes == [(48, 64)]
    assert {m.shape[2:] for m in maps} == {(3, 4)}


def test_sam_sees_a_padded_square_and_its_maps_show_the_image_alone():
    teacher = make_teacher("samvit_base_patch16", input_size=64, kwargs=SAM)
    backbone, image = teacher.backbone, make_image(1, 3, 30, 40)
    maps = teacher(image, backbone.mean, backbone.std)
    resized = F.interpolate(image, (48, 64), mode="bicubic", align_corners=False)
    square = torch.zeros(1, 3, 64, 64)
    square[..., :48, :] = resized
    full = backbone(square)
    assert [m.shape for m in full] == [(1, 24, 4, 4)] * 4
    for m, expected in zip(maps, full, strict=True):
        assert torch.equal(m, expected[:, :, :3])


def test_nothing_of_a_teacher_is_trained():
    teacher = make_teacher("test_resnet").train()
    initial = {name: value.clone() for name, value in teacher.state_dict().items()}
    maps = teacher(make_image(2, 3, 64, 64).requires_grad_(), MEAN, STD)
    assert not any(m.requires_grad for m in maps)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, initial[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [
        ("vit_base_patch14_dinov2", {}, [768] * 4),
        ("vit_base_patch16_clip_384", {}, [768] * 4),
        ("samvit_base_patch16", {"input_size": 1024}, [768] * 4),
        ("mobilenetv2_100", {"weights": "hub"}, [24, 32, 96, 320]),
    ],
)
def test_channels_are_read_without_weights(name, options, channels):
    assert read_teacher_channels(name, **options) == channels


def test_refuses_a_square_that_the_patches_do_not_fill():
    with pytest.raises(UserError, match="input_size=50 of test_vit must be a multiple of 16"):
        build_teacher("test_vit", input_size=50)
