"""Names and shapes of the tensors in SAK's public code, for networks of any size."""


def published_shapes(model, prefix="backbone.", teacher_width=50):
    """Names and shapes of the authors' code for a network of these sizes; ``prefix`` is empty in the first stage."""
    vit, dim, blocks = model.backbone.net.model, model.backbone.net.model.embed_dim, model.level_blocks
    inner, sources = next(iter(model.adapters.values()))[0].down.out_features, 1 + len(model.teachers)
    shapes = {f"{prefix}vit.{name}": tuple(p.shape) for name, p in vit.state_dict().items()}
    for name in model.teachers:
        for index in range(len(vit.blocks) + 1):
            start = f"{prefix}tsap.{name}.{index}"
            shapes |= {f"{start}.scale": (1,), f"{start}.down.weight": (inner, dim), f"{start}.down.bias": (inner,)}
            shapes |= {f"{start}.up.weight": (dim, inner), f"{start}.up.bias": (dim,)}
    for block in blocks:
        for name in model.teachers:
            shapes |= {f"{prefix}out_norms.{block}_{name}.{kind}": (dim,) for kind in ("weight", "bias")}
            shapes |= {f"{prefix}ts_aligners.{block}_{name}.weight": (teacher_width, dim)}
            shapes |= {f"{prefix}ts_aligners.{block}_{name}.bias": (teacher_width,)}
        for task in model.tasks:
            start = f"{prefix}mor.{block}_{task}.router.module"
            shapes |= {f"{start}.0.weight": (dim // 2, dim), f"{start}.0.bias": (dim // 2,)}
            shapes |= {f"{start}.1.weight": (dim // 2,), f"{start}.1.bias": (dim // 2,)}
            shapes |= {f"{start}.3.weight": (2 * sources, dim // 2), f"{start}.3.bias": (2 * sources,)}
    for task, channels in model.tasks.items():
        for level in range(len(blocks)):
            shapes |= {f"heads.{task}.linears.{level}.weight": (dim // 4, dim)}
            shapes |= {f"heads.{task}.linears.{level}.bias": (dim // 4,)}
        start = f"heads.{task}.linear_fuse"
        shapes |= {
            f"{start}.0.weight": (dim, dim, 3, 3),
            f"{start}.0.bias": (dim,),
            f"{start}.1.num_batches_tracked": (),
        }
        shapes |= {f"{start}.1.{kind}": (dim,) for kind in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {f"heads.{task}.last_conv.weight": (channels, dim, 1, 1), f"heads.{task}.last_conv.bias": (channels,)}
    return shapes
