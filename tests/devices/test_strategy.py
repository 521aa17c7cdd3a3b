"""What Lightning, DDP and DeepSpeed may do to the model that they are handed."""

import json
import os

import pytest
import torch
from lives import free_port
from runs import TINY, flags, write_inputs
from rwkv_dpo.commands import train
from rwkv_dpo.devices.settings import DeviceSettings
from rwkv_dpo.devices.strategy import bucket_numbers, build_precision, build_strategy
from rwkv_dpo.run import trainer
from rwkv_dpo.settings.fields import flags_of

STRATEGIES, PRECISIONS = (flags_of(DeviceSettings)[name].choices for name in ("strategy", "precision"))
RUNS = [(strategy, precision) for strategy in ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2") for precision in ("fp32", "bf16")]
RUNS += [("auto", "fp16"), ("ddp", "fp16"), ("deepspeed_stage_2", "fp16")]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_precision_changes_the_types_that_the_model_was_built_with(strategy, precision):
    plugins = build_precision(DeviceSettings(strategy=strategy, precision=precision), torch.device("cpu")).get("plugins", [])
    types = (torch.float32, torch.bfloat16, torch.float16)
    module = torch.nn.ParameterList([torch.zeros(2, dtype=dtype) for dtype in types])
    for plugin in plugins:
        module = plugin.convert_module(module)
    assert tuple(p.dtype for p in module) == types


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name.startswith("deepspeed")])
def test_deepspeed_times_nothing_for_which_it_would_wait(strategy):
    pytest.importorskip("deepspeed")
    from deepspeed.utils.config import get_timers_config

    built = build_strategy(DeviceSettings(strategy=strategy, precision="bf16"), torch.device("cpu"))
    assert not get_timers_config(built.config).enabled


def report_types(data, folder, runs):
    """A process of its own: trains a LoRA one way after the other, and writes the types that parameters had after a step."""
    types = {}

    class Look(trainer.pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            types[name] = {("trained" if p.requires_grad else key): str(p.dtype) for key, p in module.model.named_parameters()}

    build = trainer.build_trainer

    def build_trainer(*arguments):
        built = build(*arguments)
        built.callbacks.append(Look())
        return built

    trainer.build_trainer = build_trainer
    for strategy, precision in runs:
        name = f"{strategy} {precision}"
        os.environ["MASTER_PORT"] = str(free_port())
        changes = {"strategy": strategy, "precision": precision, "peft": "lora", "lora_r": 2, "epoch_steps": 1, "epoch_count": 1}
        train.main(flags(data, folder / name.replace(" ", "-"), **changes))
    (folder / "types.json").write_text(json.dumps(types))


def test_frozen_matrices_keep_the_compute_type_under_every_strategy(lives, tmp_path):
    from deepspeed.accelerator import get_accelerator

    write_inputs(tmp_path, TINY, 4)
    can_fp16 = get_accelerator().is_fp16_supported()
    run = [each for each in RUNS if can_fp16 or each != ("deepspeed_stage_2", "fp16")]
    process = lives.context.Process(target=report_types, args=(tmp_path, tmp_path, run))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    types = json.loads((tmp_path / "types.json").read_text())
    for strategy, precision in run:
        got = types[f"{strategy} {precision}"]
        compute = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
        frozen = ("emb.weight", "head.weight", "blocks.0.att.key.base_layer.weight", "blocks.1.ffn.value.base_layer.weight")
        assert {got[key] for key in frozen} == {compute}
        # DeepSpeed's own fp16 has everything in fp16 but its masters.
        others = compute if precision == "fp16" and "deepspeed" in strategy else "torch.float32"
        assert {got["trained"], got["blocks.0.att.time_decay"], got["blocks.1.ln1.weight"]} == {others}


def test_a_bucket_is_no_larger_than_all_gradients():
    settings = DeviceSettings(ds_bucket_mb=2)
    assert bucket_numbers(settings, 461_721_600) == 2_000_000
    assert bucket_numbers(settings, 16_515_071) == 2_000_000
    # DeepSpeed wants an even number.
    assert bucket_numbers(settings, 1_573) == 1_574
    assert bucket_numbers(settings, 1_572) == 1_572
