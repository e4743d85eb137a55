"""The choice of the backend and of its kernels."""

from __future__ import annotations

import os

import keras  # noqa: F401 - TensorFlow is running
import pytest

import runtime
from files import UserError


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_onednn_is_on_unless_the_user_says_no(monkeypatch, before, after):
    """TensorFlow leaves it off on a CPU without AVX-512."""
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", before or "")
    if before is None:
        monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    runtime.choose_backend("tensorflow")
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == after


def test_another_backend_than_the_running_one_is_refused():
    with pytest.raises(UserError, match="Keras runs on tensorflow already; set KERAS_BACKEND=jax"):
        runtime.choose_backend("jax")


def test_the_fused_batch_norm_is_for_tensorflow_without_xla(monkeypatch):
    assert runtime.has_fused_batch_norm()
    monkeypatch.setattr(runtime, "jit_compile", lambda: True)
    assert not runtime.has_fused_batch_norm()
