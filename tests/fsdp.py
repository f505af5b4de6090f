"""Under torchrun: ClippedSGD takes the same steps with FSDP2's sharded parameters, all or some."""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from baselines import build_optimizer  # noqa: E402
from model import Config, LLaMA  # noqa: E402


def main():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(97, (5, 2 * size, 17), generator=generator)  # 5 steps
    line = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicate", "shard"))
    shardings = {  # the mesh of each part: the two layers, and the rest of the model
        "nothing": (None, None, None), "everything": (line, line, line),
        "only the layers, on two meshes": (line, grid, None)}
    for foreach in (True, False):
        models = []
        for meshes in shardings.values():
            torch.manual_seed(0)
            model = LLaMA(Config(hidden=32, ffn=48, layers=2, heads=4, vocab_size=97))
            for part, mesh in zip((*model.model.layers, model), meshes):
                if mesh:
                    fully_shard(part, mesh=mesh)
            optimizer = build_optimizer("clipped_sgd", model, lr=100.0, token_clip=1e-2,
                                        update_clip=1e-3)
            for group in optimizer.param_groups:
                group["foreach"] = foreach
            for batch in batches:
                batch = batch.chunk(size)[rank]
                x, y = batch[:, :-1], batch[:, 1:]
                (model(x, y) / y.numel()).backward()
                for p in model.parameters():
                    if not isinstance(p, DTensor):  # FSDP2 averages only what it shards
                        dist.all_reduce(p.grad)
                        p.grad /= size
                optimizer.step()
                fractions = [float(v) for v in optimizer.clip_fraction.values()]
                optimizer.zero_grad()
            assert 0 < min(fractions) and max(fractions) < 1, fractions  # some clipped, not all
            weights = [p.full_tensor() if isinstance(p, DTensor) else p.detach()
                       for p in model.parameters()]
            models.append((fractions, weights))
        for (fractions, weights), sharding in zip(models, shardings):
            assert fractions == models[0][0], sharding
            torch.testing.assert_close(weights, models[0][1], rtol=1e-5, atol=1e-6, msg=sharding)
    if rank == 0:
        print("equal", size)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as train.py


if __name__ == "__main__":
    main()
