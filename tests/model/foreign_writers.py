"""Writes checkpoints of one small model as other programs write theirs: python foreign_writers.py FOLDER

FOLDER/model.pth is the model as we write it. A process of its own, because DistributedDataParallel and DeepSpeed want one.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import nn

SHAPE = (2, 32, 32, 96, 1000, 8)


class Settings:
    """A class that only the program that trains has."""

    rate = 1e-3


def lightning_checkpoint(model: nn.Module, path: Path) -> None:
    """A module that keeps the model in an attribute, a buffer of counts beside it, and what it was called with."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self, model: nn.Module, arguments: argparse.Namespace, settings: Settings) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="model")
            self.model = model
            self.reference = nn.Linear(3, 3)
            self.register_buffer("n_seen", torch.zeros(1, dtype=torch.long))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return sum(0 * p.sum() for p in self.parameters())  # type: ignore[return-value]

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.0)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
    )
    module = Module(model, argparse.Namespace(data=Path("corpus"), lr=1e-3), Settings())
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(4, 1)))
    trainer.save_checkpoint(path)


def deepspeed_checkpoint(model: nn.Module, folder: Path) -> None:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_batch_size": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True},
    )  # fmt: skip
    engine.save_checkpoint(str(folder))


def main(folder: Path) -> None:
    from conftest import random_model
    from rwkv_dpo.model.checkpoint import save_weights
    from rwkv_dpo.model.shape import ModelShape
    from safetensors.torch import save_model
    from transformers import RwkvConfig, RwkvForCausalLM

    n_layer, n_embd, dim_att, dim_ffn, vocab_size, head_size = SHAPE

    def new() -> nn.Module:
        return random_model(ModelShape(n_layer, n_embd, dim_att, dim_ffn, vocab_size, head_size), torch.float32)

    save_weights(new().state_dict(), folder / "model.pth")
    torch.save(torch.compile(new()).state_dict(), folder / "compiled.pth")
    blocks_compiled = new()
    for block in blocks_compiled.blocks:  # type: ignore[union-attr]
        block.compile()
    blocks_compiled.blocks[1] = torch.compile(blocks_compiled.blocks[1])  # type: ignore[index, operator]
    torch.save(blocks_compiled.state_dict(), folder / "compiled_blocks.pth")
    optimizer = torch.optim.AdamW((trained := new()).parameters())
    sum(p.sum() for p in trained.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = {"model": new().state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(state, folder / "script.pth")
    torch.save(state, folder / "script_old.pth", _use_new_zipfile_serialization=False)
    tied = new()
    tied.head.weight = tied.emb.weight  # type: ignore[union-attr]
    torch.save(tied.state_dict(), folder / "tied.pth")
    save_model(tied, str(folder / "tied.safetensors"))
    torch.save(new(), folder / "whole_module.pth")
    config = RwkvConfig(vocab_size=vocab_size, hidden_size=n_embd, num_hidden_layers=n_layer, attention_hidden_size=dim_att)
    RwkvForCausalLM(config).save_pretrained(folder / "hf")
    lightning_checkpoint(new(), folder / "lightning.ckpt")
    lightning_checkpoint(torch.compile(new()), folder / "lightning_compiled.ckpt")  # type: ignore[arg-type]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.save(nn.parallel.DistributedDataParallel(new()).state_dict(), folder / "ddp.pth")
    deepspeed_checkpoint(new(), folder / "deepspeed")


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "RWKV-v5" / "src"), str(root / "tests")]
    main(Path(sys.argv[1]))
