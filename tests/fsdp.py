"""Under torchrun: ClippedSGD on FSDP2's sharded parameters takes the steps that it takes on whole ones."""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import optim  # noqa: E402
from model import Config, LLaMA  # noqa: E402


def main():
    dist.init_process_group("gloo")
    batches = torch.randint(97, (5, 2 * dist.get_world_size(), 17), generator=torch.Generator().manual_seed(0))
    for foreach in (True, False):
        models = []
        for shard in (False, True):
            torch.manual_seed(0)
            model = LLaMA(Config(hidden=32, ffn=48, layers=2, heads=4, vocab_size=97))
            for part in (*model.model.layers, model) if shard else ():
                fully_shard(part)
            optimizer = optim.build("clipped_sgd", model, lr=100.0, token_clip=1e-2, update_clip=1e-3)
            optimizer.report = True
            for group in optimizer.param_groups:
                group["foreach"] = foreach
            for batch in batches:
                mine = batch.chunk(dist.get_world_size())[dist.get_rank()] if shard else batch
                (model(mine[:, :-1], mine[:, 1:]) / mine[:, 1:].numel()).backward()
                optimizer.step()
                optimizer.zero_grad()
            clipped = [float(v.full_tensor() if shard else v) for v in optimizer.clipped.values()]
            assert 0 < min(clipped) and max(clipped) < 1, clipped  # some are clipped, and not all
            models.append((clipped, dict(model.named_parameters())))
        (one, whole), (two, sharded) = models
        assert one == two
        for name, p in whole.items():
            torch.testing.assert_close(sharded[name].full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)
    if dist.get_rank() == 0:
        print("equal", dist.get_world_size())
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as train.py


if __name__ == "__main__":
    main()
