"""Name what a panel's PNG file holds, for those who only read such files; needs no torch."""

TILE_KINDS = ("label", "prediction", "error")
LAYOUT_KEY = "mtcl-layout"  # the name of the PNG text chunk that contains a panel's panel_layout
