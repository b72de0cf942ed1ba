"""A parameter server, a worker and a coordinator in one process: the layer must refuse."""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

import tensorflow as tf

import syncbn
from tests.multiprocess.cluster import free_ports


def main() -> None:
    ports = free_ports(2)
    spec = tf.train.ClusterSpec(
        {"worker": [f"127.0.0.1:{ports[0]}"], "ps": [f"127.0.0.1:{ports[1]}"]}
    )
    servers = [
        tf.distribute.Server(spec, job_name=job, task_index=0, protocol="grpc")
        for job in ("worker", "ps")
    ]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        layer = syncbn.SyncBatchNormalization()
        layer.build((None, 4))

    @tf.function
    def step():
        return strategy.run(lambda: layer(tf.ones((3, 4)), training=True))

    try:
        coordinator.schedule(step)
        coordinator.join()
    except syncbn.NotSynchronizableError as error:
        print("REFUSED:", error, flush=True)
    # The servers have no way to stop: they end with the process, at once.
    sys.stdout.flush()
    os._exit(0 if servers else 1)


if __name__ == "__main__":
    main()
