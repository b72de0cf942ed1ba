"""Which processes are the replicas: the default group, a group of some of them, none."""

import datetime

import keras
import pytest
import torch
import torch.distributed as dist
from tests.harness import Observed, assert_equals_one_device, make_case
from tests.replicas.torch import POOL, make_layer, replica_case, step, tensor

import syncbn
from syncbn._backends.torch import collectives


def on_each_rank(function, size, *arguments):
    return POOL.run(function, [(rank, *arguments) for rank in range(size)])


def observed(results):
    return Observed(*map(list, zip(*results, strict=True)))


def in_pairs(case, rank):
    """Ranks 0 and 2, and 1 and 3, each pair a group of torch's own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return step(case, "float32", True, {"process_group": groups[rank % 2]})


def test_the_processes_of_a_given_group_are_the_replicas():
    cases = [make_case([(4, 5), (7, 5)], seed=seed) for seed in range(2)]
    arguments = [(replica_case(cases[rank % 2], rank // 2), rank) for rank in range(4)]
    results = POOL.run(in_pairs, arguments)
    for first, case in enumerate(cases):
        assert_equals_one_device(case, observed(results[first::2]), 2e-6)


def outside_of_its_group(rank, group_of_others):
    group = dist.new_group([0])
    if group_of_others == "handle" and rank == 1:
        group = dist.GroupMember.NON_GROUP_MEMBER
    layer = syncbn.SyncBatchNormalization(process_group=group)
    layer(torch.ones(3, 2), training=False)
    if rank == 0:
        layer(torch.ones(3, 2), training=True)
        return None
    with pytest.raises(syncbn.NotSynchronizableError) as raised:
        layer(torch.ones(3, 2), training=True)
    return str(raised.value)


@pytest.mark.parametrize("group_of_others", ["as new_group returns it", "handle"])
def test_a_process_that_is_not_in_the_group_is_told_so(group_of_others):
    message = on_each_rank(outside_of_its_group, 2, group_of_others)[1]
    assert "requires a process group that this process is a member of" in message
    assert "in the process of rank 1" in message


def with_ranks_of_a_file(rank):
    group = dist.new_group([1, 0])
    layer = syncbn.SyncBatchNormalization(process_group=group)
    config = layer.get_config()
    again = syncbn.SyncBatchNormalization.from_config(config)
    inference = again(torch.ones(3, 2), training=False)
    assert inference.shape == (3, 2)
    with pytest.raises(syncbn.NotSynchronizableError, match=r"layer\.process_group = torch") as e:
        again(torch.ones(3, 2), training=True)
    assert "process_group=[0, 1]" in str(e.value)
    again.process_group = group
    again(torch.full((3, 2), float(rank)), training=True)
    return config["process_group"], keras.ops.convert_to_numpy(again.moving_mean).tolist()


def test_a_loaded_layer_has_the_ranks_and_wants_the_group_anew():
    results = on_each_rank(with_ranks_of_a_file, 2)
    assert results[0] == results[1]
    ranks, moving_mean = results[0]
    assert ranks == [0, 1]
    assert moving_mean == pytest.approx([0.005, 0.005])


def test_ranks_of_a_file_are_no_obstacle_in_a_process_that_is_alone():
    layer = syncbn.SyncBatchNormalization(process_group=[0, 1])
    layer(torch.ones(3, 2), training=True)
    assert layer.moving_mean.numpy() == pytest.approx([0.01, 0.01])


def test_a_layer_is_saved_also_when_its_group_has_been_destroyed(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    layer = syncbn.SyncBatchNormalization(process_group=dist.new_group([0]))
    layer(torch.ones(3, 2), training=True)
    dist.destroy_process_group()
    assert layer.get_config()["process_group"] == [0]


def test_a_group_that_is_gone_is_refused():
    layer = syncbn.SyncBatchNormalization(process_group=object())
    with pytest.raises(syncbn.NotSynchronizableError, match="init_process_group"):
        layer(torch.ones(3, 2), training=True)


def count_collectives(case, arguments):
    """How many collectives a call starts in training, its backward, inference, and when frozen."""
    counts, started = [], []
    real = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (started.append(a[0].dtype), real(*a, **k))[1]
    try:
        layer = make_layer(case, **arguments)
        x = tensor(case.parts[0]).requires_grad_()

        def counted(function):
            started.clear()
            result = function()
            counts.append([str(dtype) for dtype in started])
            return result

        y = counted(lambda: layer(x, training=True))
        counted(lambda: y.backward(tensor(case.cotangents[0])))
        counted(lambda: layer(x, training=False))
        layer.trainable = False
        counted(lambda: layer(x, training=True))
    finally:
        dist.all_reduce = real
    return counts


FORWARD, BACKWARD = ["torch.float64"], ["torch.float32"]


@pytest.mark.parametrize(
    ("arguments", "backward"),
    [
        ({}, BACKWARD),
        ({"renorm": True, "activation": "relu", "nan_check": True}, BACKWARD),
        ({"group_size": 1}, []),
        ({"group_assignment": [[0], [1]]}, []),
        ({"virtual_batch_size": 2}, []),
        ({"save": "output"}, BACKWARD),
    ],
)
def test_one_collective_forward_and_one_backward_none_in_inference(arguments, backward):
    case = make_case([(4, 5), (0, 5)])
    cases = [(replica_case(case, rank), arguments) for rank in range(2)]
    for counts in POOL.run(count_collectives, cases):
        assert counts == [FORWARD, backward, [], []]


def test_groups_of_replicas_share_one_collective_each_way():
    case = make_case([(4, 5), (0, 5), (3, 5), (2, 5)])
    cases = [(replica_case(case, rank), {"group_size": 2}) for rank in range(4)]
    for counts in POOL.run(count_collectives, cases):
        assert counts == [FORWARD, BACKWARD, [], []]


def one_does_not_come(rank):
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    if rank == 1:
        dist.barrier()
        return None
    layer = syncbn.SyncBatchNormalization(process_group=group)
    try:
        with pytest.raises(syncbn.NotSynchronizableError) as raised:
            layer(torch.ones(3, 2), training=True)
    finally:
        dist.barrier()
    return str(raised.value)


def test_a_process_that_never_calls_is_an_error_after_torch_s_own_timeout():
    message = on_each_rank(one_does_not_come, 2)[0]
    assert "all 2 processes of the group call the layer in each step" in message
    assert "Received in the process of rank 0, from torch.distributed:" in message
    assert "imed out" in message
    assert "`timeout=` of init_process_group" in message


def by_a_table(case, options):
    collectives._has_float64 = lambda _: False
    try:
        results = step(case, "float32", True, options)
        assert collectives.moments_dtype(torch.device("cpu")) == torch.float32
    finally:
        collectives._has_float64 = lambda device: device.type != "mps"
    return results


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (make_case([(9, 5), (0, 5), (14, 5)]), {}),
        (make_case([(9, 3, 5), (20, 3, 5), (14, 3, 5)]), {"group_assignment": [[0, 2], [1]]}),
        (make_case([(9, 5), (20, 5), (14, 5)]), {"nan_check": True}),
    ],
    ids=["empty", "groups", "nan_check"],
)
def test_without_float64_a_table_of_float32_gives_the_same(case, options):
    case = case._replace(options=options)
    arguments = [(replica_case(case, rank), {}) for rank in range(3)]
    assert_equals_one_device(case, observed(POOL.run(by_a_table, arguments)), 2e-6)


def test_the_table_keeps_the_variance_at_a_large_mean():
    case = make_case([(300, 5), (200, 5)], offset=1e4)._replace(momentum=0.0)
    arguments = [(replica_case(case, rank), {}) for rank in range(2)]
    variance = observed(POOL.run(by_a_table, arguments)).moving_variances[0]
    assert variance == pytest.approx(case.expected().variance, rel=1e-3)


def test_device_kinds_without_float64():
    assert collectives.moments_dtype(torch.device("mps")) == torch.float32
    assert collectives.moments_dtype(torch.device("cuda")) == torch.float64
