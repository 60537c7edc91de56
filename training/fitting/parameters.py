"""The parameters that ``--set`` can change, each with an example and its meaning.

Docs and error messages use this list. A test compares it with the fields of ``Recipe``, the
arguments of the networks and ``docs/training.md``. This module does not import torch, so that the
command line reports a typing error at once.
"""

import difflib

from msgspec import Struct


class Parameter(Struct, frozen=True):
    """One name that ``--set NAME=VALUE`` takes; ``example`` is a value."""

    name: str
    example: str
    meaning: str

    @property
    def setting(self) -> str:
        """The option of ``convoy train`` with the example: ``--set epochs=20``."""
        return f"--set {self.name}={self.example}"


TRAINING = (
    Parameter("epochs", "20", "how often every training picture is shown, at most"),
    Parameter("patience_epochs", "5", "stop after so many epochs without a better one; 0 never"),
    Parameter(
        "batch_size",
        "64",
        "pictures in a step; the default depends on the number and the size of the pictures: 8 to "
        "128, or at least 2 for pictures above 448 px a side",
    ),
    Parameter("optimizer", "sgd", "`adamw` or `sgd`"),
    Parameter(
        "learning_rate",
        "0.001",
        "the highest one; for `sgd` it is scaled by batch size / 128 unless `batch_size` is set",
    ),
    Parameter("weight_decay", "0.0005", "of kernels and matrices"),
    Parameter("warmup_share", "0.1", "part of the steps in which the learning rate rises"),
    Parameter("label_smoothing", "0.1", "part of the certainty that is spread over all classes"),
    Parameter("flip", "true", "mirror half of the pictures, left to right"),
    Parameter("crop_px", "4", "move each picture by up to so many pixels"),
    Parameter("erase", "0.5", "fill a random rectangle with noise in that part of the pictures"),
    Parameter("precision", "fp32", "`auto`, `fp32` or `bf16`, of training alone"),
)
_ACTIVATION = Parameter(
    "activation", "gelu", "`relu`, `leaky_relu`, `gelu`, `silu`, `tanh` or `sigmoid`"
)
NETWORK = {
    "dense": (Parameter("hidden", "256,128", "units of each hidden layer"), _ACTIVATION),
    "cnn": (
        Parameter("filters", "32,64,128", "filters of each convolution"),
        Parameter("kernel_size", "5", "side of the kernels; one number, or one for each layer"),
        Parameter("stride", "1", "step of the kernels; likewise"),
        Parameter("padding", "1", "pixels of zeros around each layer's input; likewise"),
        Parameter("pooling", "average", "`max` or `average`"),
        Parameter("pool_size", "1", "side of the pooling's windows; 1 leaves it out; likewise"),
        _ACTIVATION,
        Parameter("hidden", "256", "units of the layer before the classes"),
        Parameter("dropout", "0.3", "part of those units that each step leaves out"),
    ),
    "resnet": (
        Parameter("widths", "32,64", "channels of each stage; each after the first halves the map"),
        Parameter("blocks", "2", "residual blocks in each stage; one number, or one for each"),
        Parameter("stem", "large", "`small`, or `large` for pictures of 100 px and more"),
    ),
}


def find_parameter(name: str, network: str) -> Parameter | None:
    """The parameter ``name`` of a recipe whose network is ``network``."""
    for parameter in (*TRAINING, *NETWORK[network]):
        if parameter.name == name:
            return parameter
    return None


def describe_unknown(name: str, network: str) -> str:
    """The error text for an unknown parameter, with the one that the user probably meant."""
    own = [parameter.name for parameter in (*TRAINING, *NETWORK[network])]
    owners = [
        other for other, parameters in NETWORK.items() if name in {each.name for each in parameters}
    ]
    if owners:
        return (
            f"{name} is a parameter of the network {' and '.join(owners)}; "
            f"{network} has: {', '.join(own)}"
        )
    everything = dict.fromkeys(
        [*own, *(each.name for parameters in NETWORK.values() for each in parameters)]
    )
    near = difflib.get_close_matches(name, everything, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"there is no parameter {name}; {meant}{network} has: {', '.join(own)}"
