"""Words that shrink a decoder and a backbone to a test's size, the architecture left as it is.

``++backbone.kwargs`` merges: what a config says there (dilation, drop path, HRNet's plain branches) stays.
"""

DECODERS = {
    "multi_head": ["decoder.width=16", "decoder.head_width=8"],
    "deeplab": ["decoder.width=16", "decoder.dropout=0"],
    "pad_net": ["decoder.width=16", "decoder.trunk_width=16"],
    "mti_net": ["decoder.pyramid_width=8"],
    "atrc": ["decoder.widest=64"],
    "invpt": ["decoder.width=32", "decoder.prediction_width=16"],
    "invpt_plus_plus": ["decoder.width=32", "decoder.prediction_width=16"],
    "taskprompter": ["decoder.width=8", "decoder.head_width=8"],
    "diffusion_mtl": ["decoder.width=8", "decoder.head_width=8", "decoder.blocks=2"],
    "task_tokens": ["decoder.width=8", "decoder.trunk_width=12", "decoder.head_width=8", "decoder.dropout=0"],
    "task_diffusion": ["decoder.width=8", "decoder.blocks=1", "decoder.steps=2"],
    "task_expert": ["decoder.width=8", "decoder.gate_width=8", "decoder.head_width=8"],
    "linear": [],
    "sak": [],
    "segnet": [],
    "mtan": [],
    "dpt": ["decoder.width=8", "decoder.level_widths=[4,6,8,10]", "decoder.head_width=8", "decoder.final_width=8"],
    "mqtransformer": ["decoder.width=16", "decoder.head_width=8", "decoder.queries=4"],
}

PLAIN_VIT = ("taskprompter", "sak")  # decoders that are built into one

VIT = "++backbone.kwargs={embed_dim:24,depth:4,num_heads:2}"
SWIN = "++backbone.kwargs={embed_dim:12,depths:[1,1,1,1],num_heads:[1,2,2,4]}"
VGG = "++backbone.kwargs={mlp_ratio:0.01}"  # of the classifier, which is built and dropped
RESNET = "++backbone.kwargs={layers:[1,1,1,1],channels:[8,16,32,64]}"


def _stage(number: int) -> str:
    branches = [4 * 2**i for i in range(number)]
    return (
        f"stage{number}:{{num_modules:1,num_branches:{number},block_type:BASIC,num_blocks:{[1] * number},"
        f"num_channels:{branches},fuse_method:SUM}}"
    )


HRNET = f"++backbone.kwargs={{{','.join(_stage(number) for number in (2, 3, 4))}}}".replace(" ", "")
FAMILIES = {"vit": VIT, "swin": SWIN, "resnet": RESNET, "hrnet": HRNET, "vgg": VGG}


def shrunk(decoder: str, backbone: str) -> list[str]:
    """Override words for these choices of the groups ``decoder`` and ``backbone``; to be put after both."""
    family = next((name for name in FAMILIES if backbone.startswith(name)), None)
    if decoder == "mti_net" and family == "hrnet":  # narrow enough by itself, as published
        overrides = ["decoder.pyramid_width=null"]
    else:
        overrides = list(DECODERS.get(decoder, []))
    return overrides + ([FAMILIES[family]] if family else [])
