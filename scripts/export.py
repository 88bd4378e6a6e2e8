"""A trained model for other programs and other people.

    python scripts/export.py checkpoint=PATH format=safetensors|torch|onnx output=FOLDER [fixed=true] [overwrite=true]
    python scripts/export.py push=USER/NAME folder=FOLDER [private=true]
    python scripts/export.py pull=USER/NAME folder=FOLDER

safetensors  FOLDER/model.safetensors, mtcl.json, README.md (a model card): what mtcl.load(FOLDER) reads
torch        FOLDER/model.pt2, a program of torch.export: torch.export.load(PATH).module()(image)
onnx         FOLDER/model.onnx; needs pip install 'mtcl[export]'

The programs take float32 RGB (B, 3, H, W) of 0..255, normalise it themselves, and give each task's raw prediction
(B, C, H, W) by name, depth clipped at 0; what the values mean is stored with them. recipe.py beside them frames an
image of any size, runs the program and decodes what it gives, as mtcl.load does. Any batch, and any size from the
training frame on, where the model allows it, which is said at the end; fixed=true: images of that size only. Both are
run and compared with the model before they are kept. Weights are those that were validated (of trainer.ema, the
running mean); the regulariser is in none of the files.

push publishes an exported folder on the Hugging Face hub, pull fetches one; both need pip install 'mtcl[hub]'.
"""

from mtcl.cli.export import export
from mtcl.cli.script import run_with_args

if __name__ == "__main__":
    run_with_args(export, __doc__)
