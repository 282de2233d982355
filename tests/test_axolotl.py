"""The plugin for axolotl, called as its PluginManager calls plugins, on a stand-in for its BasePlugin."""

from __future__ import annotations

import importlib
import logging
import sys
import types

import pytest
from model_tiny import (
    adapt,
    build,
    gradients,
    one_thread,  # noqa: F401  (autouse)
)
from moelora import MoeloraError
from pydantic import BaseModel, ValidationError
from torch import nn


@pytest.fixture
def plugin(monkeypatch):
    """The module, with the plugin as `load_plugin` makes it."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"__init__": lambda self: None})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "moelora.axolotl", raising=False)
    module = importlib.import_module("moelora.axolotl")
    yield module.Plugin()
    sys.modules.pop("moelora.axolotl", None)


def test_the_model_is_enabled_while_it_trains(plugin, caplog):
    model = adapt(build("qwen3_moe"))
    with caplog.at_level(logging.INFO, "moelora"):
        plugin.post_model_load({"moelora": {}}, model)
    assert "computed by" in caplog.text and "operators" in caplog.text
    gradients(model)
    caplog.clear()
    plugin.post_train({}, model)
    assert not caplog.text


def test_what_saw_no_gradient_is_told(plugin, caplog):
    model = adapt(build("qwen3_moe"))
    plugin.post_model_load({}, model)
    plugin.post_train({}, model)
    assert "saw no gradient: model.layers.0" in caplog.text


def test_options(plugin, caplog):
    with pytest.raises(MoeloraError):
        plugin.post_model_load({}, nn.Linear(2, 2))
    plugin.post_model_load({"moelora": {"required": False}}, nn.Linear(2, 2))
    assert caplog.records
    plugin.post_model_load({"moelora": {"enabled": False}}, nn.Linear(2, 2))
    with pytest.raises(ValidationError, match="colour"):
        plugin.post_model_load({"moelora": {"colour": 1}}, nn.Linear(2, 2))


def test_the_schema_is_where_axolotl_looks_for_it(plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    base = type("Base", (BaseModel,), {})
    config = type("Config", (base, schema), {})  # as its merge_input_args does
    assert config(moelora={"required": False}).moelora.required is False
