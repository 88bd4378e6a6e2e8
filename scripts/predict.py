"""All tasks of a trained model on your own pictures: no labels, no dataset.

    python scripts/predict.py checkpoint=PATH input=FILE|FOLDER|VIDEO|CAMERA output=FOLDER [key=value ...]

checkpoint: a .pt file, a run's folder, an exported folder, or a name on the Hugging Face hub. input: a picture, a
folder of pictures (with all below it, but for what is hidden or was written by this script), a video, or a camera's
number (0; until Ctrl-C). Written, per picture NAME, without replacing anything (overwrite=true does):

FOLDER/semseg/NAME.png   classes (human_parts, sal alike): 8-bit numbers, with the colours of the panel as palette
FOLDER/depth/NAME.png    16 bits, millimetres (65535: that or more)
FOLDER/normals/NAME.png  3 x 8 bits: v stands for 2 v / 255 - 1; red: left, green: up, blue: to the viewer
FOLDER/edge/NAME.png     8 bits, 255 times the probability, smoothed and thinned to lines (non-maximum suppression)
FOLDER/panel/NAME.jpg    the picture with all of them in colours; panel=false leaves it out
FOLDER/predict.json      what was done, with the classes' names and the depth's scale

The same command again goes on where it was interrupted (a video starts afresh). A video gives FOLDER/NAME.mp4, the
picture and all tasks side by side (and with frames=true the maps of every frame, NAME/000000 and so on).

tasks=[semseg,depth]   only those            mode=resize|sliding_window|full   images much larger than those trained on
flip=true              mean with the mirrored picture           scales=0.75,1,1.25   mean over sizes
batch=4                pictures of one size at once             seconds=10   of a video or camera at most
device=auto|cpu|cuda   precision=auto|bf16|fp32

A file that can't be predicted is told and left out; the others are done, and the exit code is then 1.
"""

from mtcl.cli.predict import predict
from mtcl.cli.script import run_with_args

if __name__ == "__main__":
    run_with_args(predict, __doc__)
