"""Whole models: DistributedDataParallel in a loop of one's own, Keras's fit, torch.compile."""

import keras
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.harness import assert_close, make_case
from tests.replicas.torch import POOL, array, make_layer, replica_case, tensor

import syncbn

STEPS = 3


def make_model():
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False),
            syncbn.SyncBatchNormalization(activation="relu"),
            # No bias: its gradient is nothing but rounding, in front of a normalization.
            keras.layers.Conv2D(5, 3, use_bias=False),
            syncbn.SyncBatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )


def data(sizes):
    """By step and rank: examples that differ between the ranks."""
    rng = np.random.default_rng(3)
    return [
        [
            (rng.normal(rank, 1 + rank, (size, 6, 6, 3)).astype("f4"), rng.normal(size=(size, 2)))
            for rank, size in enumerate(sizes)
        ]
        for _ in range(STEPS)
    ]


def train(batches, wrap, examples):
    """SGD on the sum of the squares over all examples of all ranks; the weights at the end."""
    model = make_model()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    step = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, y in batches:
        optimizer.zero_grad()
        outputs = step(tensor(x), training=True)
        # DistributedDataParallel averages over the ranks.
        loss = (outputs - tensor(y.astype("f4"))).square().sum() * ranks / examples
        loss.backward()
        optimizer.step()
    return [array(w.value) for w in model.weights]


def as_it_is(model):
    return model


def distributed(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def distributed_and_compiled(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return torch.nn.parallel.DistributedDataParallel(compiled)


def alone(batches):
    x, y = (
        [np.concatenate([part[which] for part in step]) for step in batches] for which in (0, 1)
    )
    return train(list(zip(x, y, strict=True)), as_it_is, len(x[0]))


@pytest.mark.parametrize(
    ("sizes", "wrap"),
    [
        ((32, 32), distributed),
        ((33, 32), distributed),
        ((20, 0, 9), distributed),
        pytest.param((9, 8), distributed_and_compiled, marks=pytest.mark.frameworks),
    ],
    ids=["equal", "uneven", "one empty", "compiled"],
)
def test_distributed_data_parallel_trains_to_what_one_process_gives(sizes, wrap):
    batches = data(sizes)
    arguments = [([step[rank] for step in batches], wrap, sum(sizes)) for rank in range(len(sizes))]
    results = POOL.run(train, arguments)
    for expected, *own in zip(alone(batches), *results, strict=True):
        assert len({weight.tobytes() for weight in own}) == 1
        assert_close("weights", own[0], expected, 5e-6)


class Averaging(keras.Sequential):
    """Keras's model for torch, whose step averages the gradients over the processes."""

    def train_step(self, data):
        x, y = data
        self.zero_grad()
        loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True), training=True)
        loss.backward()
        variables = self.trainable_variables
        gradients = [v.value.grad for v in variables]
        if dist.is_initialized():
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        with torch.no_grad():
            self.optimizer.apply(gradients, variables)
        return {"loss": loss}


def fitted(parts, options, batch):
    model = Averaging(make_model().layers)
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    model.fit(*parts, batch_size=batch, epochs=1, shuffle=False, verbose=0)
    return [array(w.value) for w in model.weights]


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.frameworks)])
def test_fit_trains_to_what_one_process_gives(jit_compile):
    """In steps of 8 examples a rank; alone of both ranks' 16."""
    batches = data((8, 8))
    parts = [
        tuple(np.concatenate([step[rank][which] for step in batches]) for which in (0, 1))
        for rank in range(2)
    ]
    options = {"jit_compile": jit_compile}
    # Two compilations of a step, of about half a minute each when the machine is idle.
    results = POOL.run(fitted, [(part, options, 8) for part in parts], timeout=240)
    whole = tuple(
        np.concatenate([part[which] for step in batches for part in step]) for which in (0, 1)
    )
    alone = fitted(whole, {"jit_compile": False}, 16)
    for expected, *own in zip(alone, *results, strict=True):
        assert len({weight.tobytes() for weight in own}) == 1
        assert_close("weights", own[0], expected, 5e-6)


def compiled(case, options, backend):
    """Outputs, gradients and statistics by torch.compile without a break, and how many graphs."""
    torch.compiler.reset()
    layer = make_layer(case, **options)
    graphs = []

    def counting(module, inputs):
        graphs.append([node.target for node in module.graph.nodes])
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def function(x, **call_arguments):
        return layer(x, training=True, **call_arguments)

    x = tensor(case.parts[0]).requires_grad_()
    arguments = {} if case.masks is None else {"mask": tensor(case.masks[0])}
    y = torch.compile(function, fullgraph=True, backend=counting)(x, **arguments)
    y.backward(tensor(case.cotangents[0]))
    results = (y, x.grad, layer.gamma.value.grad, layer.beta.value.grad)
    state = (layer.moving_mean.value, layer.moving_variance.value)
    return [*map(array, (*results, *state)), len(graphs)]


def masked(case):
    rng = np.random.default_rng(3)
    return case._replace(masks=[rng.random(part.shape[:-1]) > 0.4 for part in case.parts])


@pytest.mark.parametrize(
    ("case", "options", "backend"),
    [
        pytest.param(
            make_case([(5, 3, 4), (7, 3, 4)]), {}, "inductor", marks=pytest.mark.frameworks
        ),
        (make_case([(5, 3, 4), (7, 3, 4)]), {}, "aot_eager"),
        (masked(make_case([(5, 3, 4), (7, 3, 4)])), {"activation": "silu"}, "aot_eager"),
        (make_case([(4, 3), (2, 3), (5, 3)]), {"group_assignment": [[0, 2], [1]]}, "aot_eager"),
        (make_case([(4, 3), (6, 3)]), {"renorm": True}, "aot_eager"),
    ],
    ids=["inductor", "plain", "masked and activated", "groups", "renorm"],
)
def test_torch_compile_makes_one_graph_that_gives_what_one_device_gives(case, options, backend):
    from tests.harness import Observed, assert_equals_one_device

    case = case._replace(options=options)
    ranks = range(len(case.parts))
    results = POOL.run(compiled, [(replica_case(case, rank), {}, backend) for rank in ranks])
    assert [result.pop() for result in results] == [1 for _ in ranks]
    assert_equals_one_device(case, Observed(*map(list, zip(*results, strict=True))), 2e-6)


@pytest.mark.parametrize("options", [{"nan_check": True}, {"save": "output"}], ids=str)
def test_what_must_be_able_to_stop_is_refused_where_torch_compiles(options):
    torch.compiler.reset()
    layer = make_layer(make_case([(5, 4)]), **options)
    function = torch.compile(lambda x: layer(x, training=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fullgraph=False, where the layer"):
        function(torch.randn(5, 4, requires_grad=True))


# Of torch's own, while it looks at the frames around a break.
@pytest.mark.filterwarnings("default")
def test_in_a_graph_with_breaks_it_runs_eagerly_and_stops():
    layer = make_layer(make_case([(5, 4)]), nan_check=True)
    function = torch.compile(lambda x: layer(x, training=True), backend="aot_eager")
    function(torch.randn(5, 4))
    with pytest.raises(syncbn.InputError, match="its input"):
        function(torch.full((5, 4), torch.nan))


# Of torch's own, while it looks at the frames around a break.
@pytest.mark.filterwarnings("default")
def test_save_output_in_a_graph_with_breaks_gives_what_one_device_gives():
    torch.compiler.reset()
    case = make_case([(5, 4)])
    layer = make_layer(case, save="output", activation="leaky_relu")
    function = torch.compile(lambda x: layer(x, training=True), backend="aot_eager")
    x = tensor(case.parts[0]).requires_grad_()
    y = function(x)
    y.backward(tensor(case.cotangents[0]))
    expected = case._replace(options={"activation": "leaky_relu"}).expected()
    assert_close("outputs", array(y), expected.outputs[0], 2e-6)
    assert_close("input gradients", array(x.grad), expected.input_gradients[0], 2e-6)
