"""The DeepSpeed configurations that come with the project, and what we say DeepSpeed reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from engine.config.deepspeed_keys import ZERO_OPTIONS
from engine.config.load import parse_config
from engine.config.resolve import Accelerator, DataFacts, read_deepspeed_json, resolve

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
NAMES = ["cpu_zero2", "cpu_zero3", "zero2_bf16", "zero2_fp16", "zero3_bf16", "zero3_fp16", "zero3_offload"]
REMOVED = {"cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"}


def test_the_folder_holds_these_and_the_page_names_them() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES
    page = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.json`" in page for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_filled_and_read_by_deepspeed(name: str) -> None:
    run = {
        "run": {"name": "demo", "num_steps": 10},
        "task": {"kind": "causal_lm"},
        "student": {"model": "student"},
        "data": {"manifest": "m.json"},
        "batch": {"global_sequences": 12, "micro_sequences": 3},
        "losses": [{"kind": "cross_entropy"}],
    }
    content, shown = read_deepspeed_json(str(FOLDER / f"{name}.json"))
    on_cpu = name.startswith("cpu")
    resolved = resolve(
        parse_config(run),
        world_size=1,
        accelerator=Accelerator("cpu", ("fp32", "bf16")) if on_cpu else Accelerator("cuda", ("bf16", "fp16", "fp32")),
        data=DataFacts(100, 16, 50, "causal_lm"),
        deepspeed_json=content,
        deepspeed_name=shown,
    )
    assert "auto" not in json.dumps(resolved.deepspeed)
    read = DeepSpeedConfig(resolved.deepspeed)
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (12, 4)
    assert read.zero_optimization_stage == resolved.zero_stage == (2 if "zero2" in name else 3)
    precision = (
        name.rpartition("_")[2] if name[-4:] in ("bf16", "fp16") else {"zero3_offload": "bf16"}.get(name, "fp32")
    )
    assert resolved.precision == precision
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.float16_config.enabled == (precision == "fp16")
    assert read.gradient_clipping == 1.0


def test_known_zero_options_are_those_of_deepspeed() -> None:
    fields = DeepSpeedZeroConfig.model_fields
    names = set(fields) | {field.alias for field in fields.values() if field.alias}
    assert names - REMOVED == ZERO_OPTIONS
