"""Classes and their parameters are found from a config, and a refused value is told with its key."""

import pytest

from mtcl.config.resolve import add_key_prefix, construct
from mtcl.errors import ParameterError, UserError


class Refuses:
    """Takes two parameters and refuses the one that is named."""

    def __init__(self, refused: str, **_options: int):
        raise ParameterError(refused, "=0 must be at least 1")


@pytest.mark.parametrize(
    ("group", "parameter", "key"),
    [
        ("data.options", "num_classes", "data.options.num_classes"),
        ("data.options", "root", "data.root"),
        ("regularizer.options", "num_pixels", "regularizer.options.num_pixels"),
        ("decoder", "width", "decoder.width"),
    ],
)
def test_a_refused_parameter_is_told_with_its_key(group, parameter, key):
    with pytest.raises(UserError) as refused:
        construct(Refuses, group, parameter)
    assert str(refused.value) == f"{key}=0 must be at least 1"


def test_a_prefix_is_added_once():
    with pytest.raises(UserError, match=r"^a\.b=1 is wrong$"), add_key_prefix("x."), add_key_prefix("a."):
        raise ParameterError("b", "=1 is wrong")
