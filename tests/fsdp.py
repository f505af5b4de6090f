"""Under torchrun: ClippedSGD takes the same steps with FSDP2's sharded parameters."""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Config, LLaMA  # noqa: E402
from optim import build_optimizer  # noqa: E402


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(97, (5, 2 * size, 17), generator=generator)  # 5 steps
    for foreach in (True, False):
        models = []
        for shard in (False, True):
            torch.manual_seed(0)
            model = LLaMA(Config(hidden=32, ffn=48, layers=2, heads=4, vocab_size=97))
            if shard:
                for part in (*model.model.layers, model):
                    fully_shard(part)
            optimizer = build_optimizer("clipped_sgd", model, lr=100.0, token_clip=1e-2,
                                        update_clip=1e-3)
            optimizer.track_clipping = True
            for group in optimizer.param_groups:
                group["foreach"] = foreach
            for batch in batches:
                batch = batch.chunk(size)[rank] if shard else batch
                x, y = batch[:, :-1], batch[:, 1:]
                (model(x, y) / y.numel()).backward()
                optimizer.step()
                optimizer.zero_grad()
            fractions = [float(v.full_tensor() if shard else v)
                         for v in optimizer.clip_fraction.values()]
            assert 0 < min(fractions) and max(fractions) < 1, fractions  # some clipped, not all
            models.append((fractions, dict(model.named_parameters())))
        (fractions, whole), (sharded_fractions, sharded) = models
        assert fractions == sharded_fractions
        for name, p in whole.items():
            gathered = sharded[name].full_tensor()
            torch.testing.assert_close(gathered, p.detach(), rtol=1e-5, atol=1e-6)
    if rank == 0:
        print("equal", size)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as train.py


if __name__ == "__main__":
    main()
