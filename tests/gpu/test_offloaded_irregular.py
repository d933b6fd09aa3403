"""Irregular inputs on the backends of a GPU."""

from conformance.irregular import test_gradients_of_irregular_inputs  # noqa: F401
