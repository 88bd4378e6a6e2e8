"""Images per second of the built-in rooms on one core: rendered, and read from the cache.

python scripts/benchmark_data.py [HEIGHT WIDTH]
"""

import sys
import time

from mtcl.data.rooms import Rooms
from mtcl.tasks import TASK_NAMES

COUNT = 200


def rate(reader: Rooms) -> float:
    """Images per second of this thread's own CPU time, so that a busy machine does not count."""
    began = time.thread_time()
    for index in range(COUNT):
        reader.read(index)
    return COUNT / (time.thread_time() - began)


def main() -> None:
    height, width = (int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (96, 128)
    reader = Rooms("train", TASK_NAMES, size=(height, width), length=(COUNT, 1))
    Rooms("val", TASK_NAMES, size=(height, width), cache=False).read(0)  # make the textures
    print(f"rooms at {height}x{width}, all six tasks, one core")
    print(f"rendered  {rate(reader):8.0f} images/s")
    print(f"cached    {rate(reader):8.0f} images/s")


if __name__ == "__main__":
    main()
