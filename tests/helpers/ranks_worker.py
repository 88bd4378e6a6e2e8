"""Take a few training steps and evaluate, alone or as one of several: python ranks_worker.py CASES

``CASES`` is a JSON file: folder -> overrides of the config. Starting processes takes longer than such a training, so
they do all cases one after the other. Other entries are ``from=STATE``, which continues from the ``state.pt`` of
another run; ``spoil=STEP``: there labels of every other picture, the second process's, are not finite;
``compiler=NAME``: of ``trainer.compile``; ``noise=0``: ``torch.randn_like`` draws zeros, as each process draws its own.
"""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from helpers.common import composed
from mtcl import distributed
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_training_run
from mtcl.training.checkpoint import Checkpoint
from mtcl.training.train_step import CompiledModule

STEPS = 3
OPTIONS = ("from=", "spoil=", "compiler=", "noise=")


def main(cases: dict[str, list[str]]) -> None:
    """Do all cases; the processes leave their group when all are done."""
    backend = CompiledModule.backend
    for folder, arguments in cases.items():
        with mock.patch.object(torch, "randn_like", torch.zeros_like if "noise=0" in arguments else torch.randn_like):
            train(Path(folder), arguments)
        torch._dynamo.reset()
        CompiledModule.backend = backend
    distributed.destroy_process_group()


def train(folder: Path, arguments: list[str]) -> None:
    """Do one case and write what came of it into its folder."""
    options = dict(word.split("=", 1) for word in arguments if word.startswith(OPTIONS))
    config = composed(*(word for word in arguments if word.split("=")[0] not in options))
    device = torch.device("cpu")
    distributed.init_process_group(device)
    torch.manual_seed(distributed.rank())  # DDP and FSDP give all the first one's weights
    if "compiler" in options:
        CompiledModule.backend = options["compiler"]
    tasks = build_tasks(config)
    trainer = build_training_run(config, tasks, folder, device).trainer
    if "from" in options:
        trainer.restore(Checkpoint.from_dict(torch.load(options["from"], weights_only=True)))
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # a batch norm knows its process's pictures only
    losses = []
    for number, batches in zip(range(STEPS), trainer.batches_per_step()):
        if options.get("spoil") == str(number) and distributed.rank() == distributed.world_size() - 1:
            theirs = slice(1, None, 2) if distributed.world_size() == 1 else slice(None)
            batches[0]["labels"]["normals"][theirs] = math.nan
        values = trainer.train_step(*batches, with_diagnostics=trainer.step != 1)  # compiled steps measure none
        trainer.step += 1
        losses.append(
            {
                name: (distributed.all_reduce_sum(value) / distributed.world_size()).item()
                for name, value in values.items()
            }
        )
    evaluation = trainer.evaluator.run(trainer.evaluation_model())
    state = trainer.checkpoint().to_dict()
    moments = trainer.optimizer.optimizer.state_dict()["state"]
    skipped = [entry.step for entry in trainer.nonfinite_guard.flush()]
    if distributed.rank() == 0:
        torch.save(state, folder / "state.pt")
        result = {"losses": losses, "metrics": evaluation.metrics, "images": evaluation.num_images}
        result["skipped"] = skipped
        total = sum(p.numel() for p in trainer.model.parameters())
        result["weights here"] = sum(p.numel() for p in trainer.weights.parameters) / total
        result["moments here"] = sum(m["exp_avg"].numel() for m in moments.values() if "exp_avg" in m) / total
        (folder / "found.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
