"""The PEP 517 backend: setuptools, plus a torch to build against only where the environment has none."""

from __future__ import annotations

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_editable as _editable
from setuptools.build_meta import get_requires_for_build_wheel as _wheel
from toolchain import env_flag, find_cxx, find_torch


def _torch_if_missing() -> list[str]:
    if env_flag("SPARSE_ATTN_PURE") or not find_cxx():
        return []  # nothing will be compiled
    torch = find_torch()
    return [] if torch and torch.is_new_enough else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _wheel(config_settings) + _torch_if_missing()


def get_requires_for_build_editable(config_settings=None):
    return _editable(config_settings) + _torch_if_missing()
