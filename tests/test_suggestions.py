"""Typos in commands, options, keys and values are answered with what was meant, by one function."""

import argparse
import re
from importlib import import_module

import pytest
from helpers.common import ROOT

from mtcl.cli.arguments import CommandParser
from mtcl.cli.main import COMMANDS, run_command
from mtcl.config.compose import compose_config
from mtcl.errors import UserError, find_similar


def suggestions(message: str) -> list[str]:
    return [choice for text in re.findall(r"did you mean ([^?]*)\?", message) for choice in text.split(" or ")]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("trian", "train"), ("Train", "train"), ("evalute", "evaluate"), ("eval", "evaluate"), ("preditc", "predict"),
     ("exprot", "export"), ("dmeo", "demo"), ("rusn", "runs"), ("run", "runs"), ("comapre", "compare"),
     ("reprot", "report"), ("--verison", "--version"), ("-help", "--help")],
)  # fmt: skip
def test_a_command(typed, expected):
    with pytest.raises(UserError) as caught:
        run_command([typed])
    assert suggestions(str(caught.value)) == [expected]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("predict a b --ouput c", "--output"), ("predict a b --output c --taks depth", "--tasks"),
     ("predict a b --output c --noPanel", "--no-panel"), ("predict a b --output c --batchsize 2", "--batch-size"),
     ("predict a b --output c --mode slding_window", "sliding_window"), ("predict a b -output c", "--output"),
     ("predict a b --output c --device cdua", "cuda"), ("predict a b --output c --sav-frames", "--save-frames"),
     ("export a --formt onnx", "--format"), ("export a --format safetensor --output b", "safetensors"),
     ("export a --output b --fixedsize", "--fixed-size"), ("demo a --prot 1", "--port"), ("demo a --hots b", "--host"),
     ("demo a --compar b", "--compare"), ("demo a --max_pixels 1", "--max-pixels"),
     ("runs --jsn", "--json"), ("compare a --basline b", "--baseline"), ("compare a --format markdwn", "markdown"),
     ("compare a --agianst b", "--against"), ("compare a --holms", "--holm"), ("report a --ouput b", "--output"),
     ("report a --output b --titel c", "--title")],
)  # fmt: skip
def test_an_option(line, expected):
    command, *arguments = line.split()
    module = import_module(f"mtcl.cli.{command}")
    parser = CommandParser(module.__doc__, f"mtcl {command}")
    module.add_arguments(parser)
    with pytest.raises(UserError) as caught:
        parser.parse_intermixed_args(arguments)
    assert suggestions(str(caught.value)) == [expected], caught.value


# override -> what is meant
OVERRIDES: dict[str, str | None] = {
    "trainer.max_step=3": "trainer.max_steps",
    "trainr.max_steps=3": "trainer.max_steps",
    "max_steps=3": "trainer.max_steps",
    "+trainr.max_steps=3": "trainer.max_steps",
    "optimiser.lr=1": "optimizer.lr",
    "regularizer.opitons.margin=1": "regularizer.options.margin",
    "regularizer.margin=1": "regularizer.options.margin",
    "loss.weigths.depth=1": "loss.weights.depth",
    "tasks.name=[depth]": "tasks.names",
    "Seed=1": "seed",
    "experiments=rooms": "experiment",
    "experiment=roms": "rooms",
    "decoder=mtinet": "mti_net",
    "backbone=vitbase": "vit_base",
    "optimizer=AdamW": "adamw",
    "+recipe=invtp": "invpt",
}
MORE_OVERRIDES: dict[str, str | None] = {  # composing takes a moment each
    "trainer.maxsteps=3": "trainer.max_steps",
    "+trainer.max_step=3": "trainer.max_steps",
    "train.max_steps=3": "trainer.max_steps",
    "trainer.device_=cpu": "trainer.device",
    "optimizer.learning_rate=1": None,
    "regulariser.weight=1": "regularizer.weight",
    "regularizer.wieght=1": "regularizer.weight",
    "regularizer.options.mrgin=1": "regularizer.options.margin",
    "data.bacth_size=2": "data.batch_size",
    "batch_size=2": "data.batch_size",
    "data.augment.scales=[1,2]": "data.augment.scale",
    "loss.weights.deph=1": "loss.weights.depth",
    "task.names=[depth]": "tasks.names",
    "backbone.weight=hub": "backbone.weights",
    "sed=1": "seed",
    "resum=auto": "resume",
    "decodr=invpt": "decoder",
    "regulariser=none": "regularizer",
    "experiment=nyud_invpt_vitbase": "nyud_invpt_vit_base",
    "experiment=nyud_mtinet_hrnet18": "nyud_mti_net_hrnet18",
    "decoder=taskpromter": "taskprompter",
    "decoder=InvPT": "invpt",
    "backbone=mobilenet": "mobilenetv2",
    "regularizer=contrast": "contrastive",
    "data=nyu": "nyud",
    "data=pasca": "pascal",
    "schedule=cosin": "cosine",
    "balancing=dbmtl": "db_mtl",
    "debug=tinny": "tiny",
    "evaluation=standrd": "standard",
    "trainer=defualt": "default",
    "tasks=single_dpth": "single_depth",
}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        *(pytest.param(*item, id=item[0]) for item in OVERRIDES.items()),
        *(
            pytest.param(override, expected, id=override, marks=pytest.mark.slow)
            for override, expected in MORE_OVERRIDES.items()
        ),
    ],
)
def test_an_override(override, expected):
    with pytest.raises(UserError) as caught:
        compose_config([override], ROOT / "configs")
    assert suggestions(str(caught.value))[:1] == ([] if expected is None else [expected]), caught.value


def test_evaluate_suggests_its_own_keys():
    with pytest.raises(UserError) as caught:
        compose_config(["chekpoint=a.pt"], ROOT / "configs", "evaluate")
    assert suggestions(str(caught.value)) == ["checkpoint"]


def test_every_command_answers_options_with_the_same_parser():
    """The list above has each of them; a new command needs a row."""
    for command in COMMANDS:
        parser = CommandParser("", f"mtcl {command}")
        import_module(f"mtcl.cli.{command}").add_arguments(parser)
        option = next(one for action in parser._actions for one in action.option_strings if one.startswith("--") and
                      not isinstance(action, argparse._HelpAction))  # fmt: skip
        with pytest.raises(UserError, match=re.escape(f"did you mean {option}?")):
            parser.error(f"unrecognized arguments: {option}e")


def test_one_function_compares_names():
    users = [path for path in (ROOT / "mtcl").rglob("*.py") if "difflib" in path.read_text("utf-8")]
    assert [path.name for path in users] == ["errors.py"]


@pytest.mark.parametrize(
    ("name", "choices", "similar"),
    [("x", ["weight", "seed"], []), ("PAD-net", ["pad_net", "mti_net"], ["pad_net"]), ("", ["a"], []),
     ("fla", ["flip", "flat"], ["flat"]), ("con", ["contrast", "consistency"], [])],
)  # fmt: skip
def test_names_that_mean_nothing_get_no_suggestion(name, choices, similar):
    assert find_similar(name, choices) == similar
