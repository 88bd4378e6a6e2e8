"""A trained model as a web page on this machine: drop a picture and see all tasks; point at them to read metres.

    python scripts/demo.py checkpoint=PATH [compare=OTHER] [key=value ...]

checkpoint: a .pt file, a run's folder, an exported folder, or a name on the Hugging Face hub; compare: another one,
shown beside it with the tasks that both have.

port=7860      host=127.0.0.1   only this machine; another address of it lets others in, too
device=auto|cpu|cuda            mode=resize|sliding_window|full   images much larger than those trained on
max_mb=25  max_pixels=50000000  larger files and pictures are refused

One picture is predicted at a time. Pictures are not kept; nothing is sent elsewhere. Ctrl-C ends it.
Needs Gradio: pip install 'mtcl[demo]'.
"""

from mtcl.cli.demo import demo
from mtcl.cli.script import run_with_args

if __name__ == "__main__":
    run_with_args(demo, __doc__)
