"""Small models of every family of backbones."""

import torch

from mtcl.models import EncoderDecoder, build_backbone
from mtcl.models.decoders import MultiHead

TASKS = {"semseg": 7, "depth": 1, "normals": 3, "edge": 1}
VIT = {"depth": 4, "embed_dim": 48, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
FAMILIES = {  # name -> timm's name, its options, strides
    "cnn": ("test_resnet", {}, [4, 8, 16, 32]),
    "mobile": ("mobilenetv2_050", {}, [4, 8, 16, 32]),
    "vit": ("vit_tiny_patch16_224", VIT, [16] * 4),
    "vit with patches of 14": ("vit_small_patch14_dinov2", VIT, [14] * 4),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, [4, 8, 16, 32]),
    "hrnet": ("hrnet_w18_small", {}, [4, 8, 16, 32]),
}


def make_model(family="cnn", tasks=TASKS, seed=0, **options):
    torch.manual_seed(seed)
    name, kwargs, _ = FAMILIES[family]
    backbone = build_backbone(name, kwargs=kwargs)
    return EncoderDecoder(
        backbone, MultiHead(backbone.channels, backbone.strides, tasks, width=12, head_width=8, **options)
    )


def make_image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
