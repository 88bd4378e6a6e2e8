"""A few training steps and an evaluation, alone or as one of several: python ranks_worker.py FOLDER WORD ..."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from conftest import composed
from torch import nn

from mtcl import ranks, training
from mtcl.entry import build
from mtcl.training.step import Compiled

STEPS = 3


def main(folder: Path, words: list[str]) -> None:
    config, device = composed(*words), torch.device("cpu")
    ranks.join(device)
    torch.manual_seed(ranks.rank())  # DDP gives all the first one's weights
    tasks = build.build_tasks(config)
    # The compiler's own code is tested elsewhere: here, that its graphs are cut where DDP wants them.
    training.trainer.Compiled = partial(Compiled, backend="aot_eager")
    trainer = build.build_trainer(config, tasks, folder, device).trainer
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # a batch norm knows its process's pictures only
    losses = []
    for _, batch in zip(range(STEPS), trainer.batches):
        values = trainer.train_step(batch, with_diagnostics=trainer.step != 1)  # a compiled step measures no gradients
        trainer.step += 1
        losses.append({name: (ranks.total(value) / ranks.world()).item() for name, value in values.items()})
    evaluation = trainer.evaluator.run(trainer.model)
    if ranks.rank() == 0:
        weights = {name: p.detach() for name, p in trainer.wrapped.state_dict().items()}
        torch.save({name.removeprefix("module."): value for name, value in weights.items()}, folder / "weights.pt")
        found = {"losses": losses, "metrics": evaluation.metrics, "images": evaluation.num_images}
        (folder / "found.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
