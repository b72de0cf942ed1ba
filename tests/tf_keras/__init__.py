"""Tests of the layer for tf_keras."""
