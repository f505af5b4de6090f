"""The optimizers that are compared, with parameter groups by kind of tensor of a LLaMA; and SCALE,
which PyTorch does not have."""
import torch

from optim import ClippedSGD


class SCALE(torch.optim.Optimizer):
    """Normalized SGD with momentum on the output layer alone (arXiv 2506.16659): each row of a
    matrix's gradient, and each column of the embedding's, is divided by its RMS; the gains of the
    norms are trained by Adam with betas 0.9 and 0.999.

    Options of a group: normalize, the dimension along which the RMS is taken, or None for Adam; and
    momentum: above 0, not the gradient but its average, with this decay, is normalized."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, momentum=0.0, normalize=1))
        for group in self.param_groups:
            if group["normalize"] is not None and any(p.dim() != 2 for p in group["params"]):
                raise ValueError("normalize needs matrices: give other parameters a group of their "
                                 "own, with normalize None")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                u, state = p.grad, self.state[p]
                if group["normalize"] is None:
                    if not state:
                        state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    state["step"] += 1
                    m = state["m"].lerp_(u, 1 - 0.9) / (1 - 0.9 ** state["step"])
                    v = state["v"].lerp_(u * u, 1 - 0.999) / (1 - 0.999 ** state["step"])
                    p.sub_(m / (v.sqrt() + 1e-8), alpha=group["lr"])
                    continue
                if group["momentum"]:
                    if not state:
                        state["m"] = torch.zeros_like(p)
                    u = state["m"].lerp_(u, 1 - group["momentum"])
                rms = u.square().mean(group["normalize"], keepdim=True).sqrt()
                p.sub_(u / rms.clamp(min=1e-8), alpha=group["lr"])


def build_optimizer(name, model, lr, momentum=0.9, token_clip=1e-3, row_clip=None,
                    row_clip_on="all", update_clip=5e-4, schedule_update_clip=False, beta1=0.9,
                    beta2=0.95, weight_decay=0.0, multipliers={}):
    """One of the optimizers compared, for a LLaMA. "sgd" is ClippedSGD without the clips, so that
    the two differ in nothing else.

    It has four parameter groups: embedding, lm_head, matrix (the other matrices) and norm.
    multipliers, {group: number}, multiply both lr and update_clip, so that the step is as many
    times larger whichever of the two limits it. row_clip is the token_clip of the embedding and,
    unless row_clip_on is "embedding", of the other matrices. group["peak"] holds the options that
    train.py multiplies by the schedule at each step.
    """
    kinds = {"embedding": [model.model.embed_tokens.weight], "lm_head": [model.lm_head.weight],
             "matrix": [], "norm": []}
    assigned = {p for params in kinds.values() for p in params}
    for p in [p for p in model.parameters() if p not in assigned]:
        kinds["matrix" if p.dim() == 2 else "norm"].append(p)
    groups = []
    for kind, params in kinds.items():
        factor = multipliers.get(kind, 1.0)
        group = {"params": params, "lr": factor * lr, "peak": {"lr": factor * lr}}
        if name == "clipped_sgd":
            clips = {"lm_head": token_clip, "embedding": row_clip,
                     "matrix": row_clip if row_clip_on == "all" else None}
            group["token_clip"] = clips.get(kind)
            group["update_clip"] = update_clip and factor * update_clip
            if schedule_update_clip and update_clip:
                group["peak"]["update_clip"] = group["update_clip"]
        elif name == "scale":
            group["normalize"] = {"embedding": 0, "norm": None}.get(kind, 1)
            group["momentum"] = momentum if kind == "lm_head" else 0
        groups.append(group)
    if name == "clipped_sgd":
        return ClippedSGD(groups, lr, momentum)
    if name == "sgd":
        return ClippedSGD(groups, lr, momentum, update_clip=None)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, (beta1, beta2), weight_decay=weight_decay, fused=True)
    if name == "scale":
        return SCALE(groups, lr)
    raise ValueError(f"no optimizer {name}: choose clipped_sgd, sgd, adamw or scale")
