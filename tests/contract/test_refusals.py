"""What no layer can be made of is refused when it is made: required, received, remedy."""

import pytest
from tests.which_keras import SyncBatchNormalization, keras

import syncbn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 0}, "Received: group_size=0"),
        ({"group_size": -2}, "Received: group_size=-2"),
        ({"group_size": 1.5}, "Received: group_size=1.5"),
        ({"group_size": True}, "Received: group_size=True"),
        ({"group_size": 2, "group_assignment": [[0, 1]]}, "not both"),
        ({"group_assignment": [[0, 1], [1, 2]]}, r"replicas \[1\] more than once"),
        ({"group_assignment": [[0, 0]]}, r"replicas \[0\] more than once"),
        ({"group_assignment": [[0], []]}, "an empty group"),
        ({"group_assignment": []}, "something else than lists"),
        ({"group_assignment": [0, 1]}, "something else than lists"),
        ({"group_assignment": [[0, -1]]}, r"Received: \[-1\]"),
        ({"group_assignment": [["a"]]}, r"Received: \['a'\]"),
    ],
)
def test_what_can_be_no_partition_is_refused_when_the_layer_is_made(arguments, message):
    with pytest.raises(syncbn.InputError, match=message):
        SyncBatchNormalization(**arguments)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_a_virtual_batch_size_that_is_none_is_refused(size):
    with pytest.raises(syncbn.InputError, match="virtual_batch_size requires a number of examples"):
        SyncBatchNormalization(virtual_batch_size=size)


@pytest.mark.parametrize(
    "other", [{"group_size": 2}, {"group_assignment": [[0, 1]]}, {"renorm": True}]
)
def test_virtual_batches_compose_with_no_other_grouping(other):
    with pytest.raises(syncbn.InputError, match="requires that it is alone"):
        SyncBatchNormalization(virtual_batch_size=4, **other)


@pytest.mark.parametrize(
    "activation",
    [
        "nonsense",
        "glu",  # changes the shape
        "get",  # no activation, but a name there
        lambda x: keras.random.dropout(x, 0.5),  # computed again it would be another
        keras.layers.PReLU(),
        keras.layers.ReLU,
        3,
    ],
)
def test_anything_but_an_activation_of_keras_is_refused(activation):
    with pytest.raises(syncbn.InputError, match=r"requires the name of an activation .* layer"):
        SyncBatchNormalization(activation=activation)


@pytest.mark.parametrize(
    ("clipping", "message"),
    [
        ({"rmax": 0.5, "rmin": 2.0}, r"Received: rmin=2\.0, rmax=0\.5\."),
        ({"dmax": -1.0}, r"dmax >= 0\. Received: dmax=-1\.0\."),
        ({"rmax": -1.0}, r"rmax >= 0\. Received: rmax=-1\.0\."),
        ({"rmx": 1.0}, r"Received: \['rmx'\] in renorm_clipping=\{'rmx': 1\.0\}"),
        ({"rmax": float("nan")}, r"Received: \{'rmax': nan\}"),
        ({"rmax": "3"}, r"Received: \{'rmax': '3'\}"),
        ([1, 2], r"requires a dictionary .* Received: renorm_clipping=\[1, 2\]"),
    ],
)
def test_bad_clipping_is_refused_with_its_values_of_which_keras_prints_none(clipping, message):
    with pytest.raises(syncbn.InputError, match=message):
        SyncBatchNormalization(renorm=True, renorm_clipping=clipping)


@pytest.mark.parametrize("momentum", [None, "a"])
def test_a_momentum_of_renormalization_that_is_none_is_refused(momentum):
    with pytest.raises(syncbn.InputError, match=f"Received: renorm_momentum={momentum!r}"):
        SyncBatchNormalization(renorm=True, renorm_momentum=momentum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save": "both"}, 'save requires "input" or "output".*Received: save=\'both\''),
        ({"activation": "relu"}, "requires an activation whose result gives back.*'relu'"),
        ({"activation": "elu"}, "Take leaky_relu, or"),
        ({"activation": "gelu"}, "as a layer of its own"),
        ({"activation": "sigmoid"}, "'sigmoid'"),
        ({"virtual_batch_size": 2}, "virtual_batch_size=2. Remove one"),
        ({"renorm": True, "group_size": 2}, "renorm=True with groups"),
    ],
)
def test_what_cannot_be_inverted_is_refused(arguments, message):
    with pytest.raises(syncbn.InputError, match=message):
        SyncBatchNormalization(**({"save": "output"} | arguments))


@pytest.mark.parametrize("value", [True, False])
def test_synchronized_is_not_an_argument(value):
    with pytest.raises(TypeError, match="this layer always synchronizes"):
        SyncBatchNormalization(synchronized=value)
