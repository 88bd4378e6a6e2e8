"""Name the files of an exported model, and the models that come with mtcl."""

from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
METADATA_FILE = "mtcl.json"  # also the name under which programs hold their metadata
CARD_FILE = "README.md"
PROGRAM_FILE = "model.pt2"
ONNX_FILE = "model.onnx"
RECIPE_FILE = "recipe.py"  # beside a program; never downloaded: it would be a stranger's code
HUB_FILES = (WEIGHTS_FILE, METADATA_FILE, CARD_FILE, PROGRAM_FILE, ONNX_FILE, f"{ONNX_FILE}.data")  # as far as written

SHIPPED_MODELS = {"rooms": Path(__file__).parent / "shipped" / "rooms"}  # exported folders; made by `make rooms-model`
