"""The models of the fixtures, for any Keras: the old ones that saved them and the one that loads.

Python 3.8 has to read this file, for TensorFlow 2.2. `keras` is the module, `norm` makes a batch
normalization. Every function returns the model and its layers with weights by their part in it.
"""

import zlib

import numpy as np

SIZE = (5, 4, 2)


def functional(keras, norm):
    """Two branches of the same shapes, the later one used first: order and names are told apart."""
    layers = keras.layers
    parts = {
        "stem": layers.Conv2D(3, 2, padding="same"),
        "stem_norm": norm(),
        "left": layers.Conv2D(3, 1),
        "left_norm": norm(),
        "right": layers.Conv2D(3, 1),
        "right_norm": norm(),
        "head": layers.Dense(2, name="head"),
    }
    inputs = keras.Input(SIZE)
    x = layers.ReLU()(parts["stem_norm"](parts["stem"](inputs)))
    left = layers.ReLU()(parts["left_norm"](parts["left"](x)))
    right = parts["right_norm"](parts["right"](x))
    x = layers.GlobalAveragePooling2D()(layers.Subtract()([right, left]))
    return keras.Model(inputs, parts["head"](x)), parts


def nested(keras, norm):
    """A model in a model, whose first convolution is frozen: its weights come last in HDF5."""
    layers = keras.layers
    parts = {
        "stem": layers.Conv2D(3, 2, use_bias=False, trainable=False),
        "stem_norm": norm(),
        "depthwise": layers.DepthwiseConv2D(2, use_bias=False),
        "depthwise_norm": norm(),
        "norm": norm(),
        "head": layers.Dense(2),
    }
    inputs = keras.Input(SIZE)
    x = layers.ReLU()(parts["stem_norm"](parts["stem"](inputs)))
    x = parts["depthwise_norm"](parts["depthwise"](x))
    backbone = keras.Model(inputs, x, name="backbone")
    outer = keras.Input(SIZE)
    x = layers.GlobalAveragePooling2D()(parts["norm"](backbone(outer)))
    return keras.Model(outer, parts["head"](x)), parts


def subclassed(keras, norm):
    """Layers in attributes, in a layer of one's own, and such layers in a list."""
    layers = keras.layers

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.conv = layers.Conv2D(3, 1)
            self.bn = norm()

        def call(self, inputs, training=False):
            return self.bn(self.conv(inputs), training=training)

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.stem = layers.Conv2D(3, 2)
            self.norm = norm()
            self.blocks = [Block(), Block()]
            self.pool = layers.GlobalAveragePooling2D()
            self.head = layers.Dense(2)

        def call(self, inputs, training=False):
            x = self.norm(self.stem(inputs), training=training)
            for block in self.blocks:
                x = x + block(x, training=training) ** 2
            return self.head(self.pool(x))

    model = Net()
    model(np.zeros((1, *SIZE), "float32"))
    parts = {"stem": model.stem, "norm": model.norm, "head": model.head}
    for number, block in enumerate(model.blocks):
        parts[f"conv_{number}"] = block.conv
        parts[f"bn_{number}"] = block.bn
    return model, parts


MODELS = {"functional": functional, "nested": nested, "subclassed": subclassed, "flag": functional}


def values(part, name, shape):
    """What a weight of the fixtures is: the same whenever it is asked for."""
    draw = np.random.RandomState(zlib.crc32(f"{part}/{name}".encode()))
    if name == "moving_variance":
        return draw.uniform(0.5, 2.0, shape).astype("float32")
    return draw.normal(1.0 if name == "gamma" else 0.0, 0.7, shape).astype("float32")


def leaf(variable):
    """The name of a weight: `gamma` of `block/bn/gamma:0`, and one name for Keras 2's and 3's."""
    name = variable.name.split("/")[-1].split(":")[0]
    return "kernel" if name == "depthwise_kernel" else name


def fill(parts):
    """Give every weight its value."""
    for part, layer in parts.items():
        layer.set_weights([values(part, leaf(w), tuple(w.shape)) for w in layer.weights])


def inputs():
    """A batch for inference."""
    return np.random.RandomState(0).normal(0.5, 2.0, (3, *SIZE)).astype("float32")
