"""Files that torch writes: tensors alone are read, with real modules as the oracle."""

import keras
import numpy as np
import pytest
import torch

from syncbn import SyncBatchNormalization
from syncbn.checkpoints import load_weights
from syncbn.errors import InputError


def test_a_file_of_real_modules_moves_and_an_object_is_not_unpickled(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, (2, 3), groups=2),
        torch.nn.SyncBatchNorm(6),
        torch.nn.ConvTranspose2d(6, 5, (3, 2), stride=2, bias=False),
        torch.nn.Conv2d(5, 10, 2, groups=5),
    )
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    net.eval()
    torch.save(
        {f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "a.pt"
    )
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((7, 8, 4)),
            layers.Conv2D(6, (2, 3), groups=2, name="a"),
            SyncBatchNormalization(epsilon=1e-5, name="b"),
            layers.Conv2DTranspose(5, (3, 2), strides=2, use_bias=False, name="c"),
            layers.DepthwiseConv2D(2, depth_multiplier=2, name="d"),
        ]
    )
    load_weights(model, tmp_path / "a.pt", names={"a": "0", "b": "1", "c": "2", "d": "3"})
    x = torch.randn(2, 4, 7, 8)
    expected = net(x).detach().numpy()
    outputs = keras.ops.convert_to_numpy(model(x.permute(0, 2, 3, 1), training=False))
    assert np.allclose(np.moveaxis(outputs, -1, 1), expected, atol=1e-5)
    torch.save(net, tmp_path / "object.pt")
    with pytest.raises(InputError, match="nothing else is unpickled"):
        load_weights(model, tmp_path / "object.pt", names={"a": "0"}, partial=True)
