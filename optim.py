"""SGD with two clips, which let it use a learning rate of 100 ("SGD-LL", Glentis et al. 2026,
arXiv 2605.17787), and the baselines that it is compared with.

    >>> head = model.lm_head.weight
    >>> body = [p for p in model.parameters() if p is not head]
    >>> optimizer = ClippedSGD([{"params": body}, {"params": [head], "token_clip": 1e-3}], lr=100.0)

Needs torch and nothing else: copy this file into a project of your own.
"""
import torch


def _norm(m, **options):
    """L2 norm, in fp32 or better."""
    return torch.linalg.vector_norm(m, dtype=torch.promote_types(m.dtype, torch.float32), **options)


def _single_tensor(params, grads, momenta, lr, momentum, token_clip, update_clip):
    """The reference: one step on lists of tensors, in place, one tensor after the other.

    Returns two lists: the step size of each tensor (0-d), empty if update_clip is None, and the
    factor of each row ([rows, 1] per tensor), empty if token_clip is None.
    """
    step_sizes, row_factors = [], []
    for p, g, m in zip(params, grads, momenta):
        if momentum:
            m.lerp_(g, 1 - momentum)
        u, step_size = m, lr
        if token_clip is not None:  # a row of zeros has the factor inf, clamped to 1
            factor = (token_clip / _norm(u, dim=1, keepdim=True)).clamp(max=1.0)
            row_factors.append(factor)
            u = u * factor
        if update_clip is not None:
            rms = _norm(u) / u.numel() ** 0.5
            step_size = (update_clip / rms).clamp(max=lr)
            step_sizes.append(step_size)
        p.sub_(u * step_size)
    return step_sizes, row_factors


def _multi_tensor(params, grads, momenta, lr, momentum, token_clip, update_clip):
    """The same with torch._foreach_*: one call for all tensors, and no copy of the momentum. Both
    clips only shrink, so the update is momentum times one factor per tensor, or one per row."""
    step_sizes, row_factors = [], []
    if momentum:
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
    if token_clip is not None or update_clip is not None:
        row_norms = [_norm(m, dim=-1, keepdim=True) for m in momenta]
    if token_clip is not None:
        row_factors = [(token_clip / norm).clamp_(max=1.0) for norm in row_norms]
        row_norms = torch._foreach_mul(row_norms, row_factors)  # the norms after the clip
    if update_clip is not None:
        norms = torch._foreach_norm(row_norms)
        step_sizes = [(update_clip * m.numel() ** 0.5 / norm).clamp(max=lr)
                      for m, norm in zip(momenta, norms)]

    factors = step_sizes
    if token_clip is not None:
        factors = torch._foreach_mul(row_factors, step_sizes or lr)
    if factors:
        torch._foreach_addcmul_(params, momenta, factors, value=-1)
    elif isinstance(lr, torch.Tensor):  # alpha would be read on the host
        torch._foreach_sub_(params, torch._foreach_mul(momenta, lr))
    else:
        torch._foreach_add_(params, momenta, alpha=-lr)
    return step_sizes, row_factors


class ClippedSGD(torch.optim.Optimizer):
    """SGD with row-wise clipping of the momentum and per-tensor RMS clipping of the update.

    For each tensor w with gradient g, in this order (Glentis et al. 2026 and their release):
        m <- momentum * m + (1 - momentum) * g     zero start, no bias correction, no Nesterov
        u <- m, each row scaled down to an L2 norm of at most token_clip
        u <- u, scaled down so that lr * rms(u) is at most update_clip
        w <- w - lr * u
    The clips leave m as it is. Without them this is torch.optim.SGD with dampening = momentum, but
    for the start: torch's m begins as the first g. lr is 1 / (1 - momentum) times that of SGD
    without dampening. step() does not synchronize with the host.

    Args (all but params can differ between parameter groups):
        params: parameters or groups, of any floating dtypes. State: one tensor per parameter.
        lr: in weight units per gradient unit; 100 to 300 in the paper. A number or a 0-d tensor.
        momentum: decay of the average, in [0, 1). Default 0.9; 0 needs no state.
        token_clip: largest norm of a row of m, in gradient units, or None (default). The paper has
            it on lm_head's weight [vocab, hidden] alone, whose rows are token classes, at 1e-3.
            It suits any matrix; on all of them (--row_clip of train.py) it is ours.
        update_clip: largest RMS of a tensor's update, in weight units, or None. Default 5e-4, the
            paper's (2e-4 at 1B). While it binds, neither lr nor its schedule changes the step.
        foreach: all tensors at once (default), or the reference, one after the other.
    """
    def __init__(self, params, lr, momentum=0.9, token_clip=None, update_clip=5e-4, foreach=True):
        self._clipped = {"tensors": [], "rows": []}
        super().__init__(params, dict(lr=lr, momentum=momentum, token_clip=token_clip,
                                      update_clip=update_clip, foreach=foreach))

    def __getstate__(self):  # of copies and pickles
        return {**super().__getstate__(), "_clipped": self._clipped}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        if getattr(group["lr"], "ndim", 0) or not group["lr"] >= 0:
            raise ValueError(f"lr must be one number, at least 0, not {group['lr']}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), not {group['momentum']}")
        for name in ("token_clip", "update_clip"):
            if group[name] is not None and not group[name] > 0:
                raise ValueError(f"{name} must be above 0 or None, not {group[name]}")
        if group["token_clip"] is not None and any(p.dim() != 2 for p in group["params"]):
            raise ValueError("token_clip needs 2-D parameters: put the others in another group")
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._clipped["tensors"], self._clipped["rows"] = [], []
        for group in self.param_groups:
            lists = {}  # what one torch._foreach_* call takes: one type, device, dtype and mesh
            for p in [p for p in group["params"] if p.grad is not None]:
                if p.grad.is_sparse:
                    raise RuntimeError("ClippedSGD does not support sparse gradients")
                g = m = p.grad.to(p.dtype)  # without momentum, m is g
                if group["momentum"]:  # m follows p where model.to() has converted or moved it
                    m = self.state[p].get("momentum_buffer")
                    m = torch.zeros_like(p) if m is None else m.to(p)
                    self.state[p]["momentum_buffer"] = m
                kind = type(p), p.device, p.dtype, getattr(p, "device_mesh", None)
                lists.setdefault(kind, []).append((p, g, m))
            update = _multi_tensor if group["foreach"] else _single_tensor
            options = [group[name] for name in ("lr", "momentum", "token_clip", "update_clip")]
            for tensors in lists.values():
                step_sizes, row_factors = update(*zip(*tensors), *options)
                if step_sizes:
                    self._clipped["tensors"].append(torch.stack(step_sizes) < group["lr"])
                if row_factors:
                    self._clipped["rows"].append(torch.cat(row_factors) < 1)
        return loss

    @property
    def clip_fraction(self):
        """Of the last step, as 0-d tensors; None where a clip is off. FSDP2: read on all ranks."""
        def mean(flags):
            flags = [f.full_tensor() if hasattr(f, "full_tensor") else f for f in flags]
            return torch.cat([f.flatten().to(flags[0].device) for f in flags]).float().mean()
        return {name: mean(flags) if flags else None for name, flags in self._clipped.items()}


class SCALE(torch.optim.Optimizer):
    """Normalized SGD with momentum on the output layer alone (arXiv 2506.16659): each row of a
    matrix's gradient, and each column of the embedding's, is divided by its RMS; norm gains, in
    groups whose `normalize` is None, take Adam.

    Every group has the options normalize, the dimension along which the RMS is taken, and momentum,
    the decay of the average that is normalized in the gradient's place, 0 for none."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, momentum=0.0, normalize=1))

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
                    m = state.setdefault("m", torch.zeros_like(p))
                    u = m.lerp_(u, 1 - group["momentum"])
                rms = u.square().mean(group["normalize"], keepdim=True).sqrt()
                p.sub_(u / rms.clamp(min=1e-8), alpha=group["lr"])


def build_optimizer(name, model, lr, momentum=0.9, token_clip=1e-3, row_clip=None,
                    row_clip_on="all", update_clip=5e-4, schedule_update_clip=False, beta1=0.9,
                    beta2=0.95, weight_decay=0.0, multipliers={}):
    """One of the optimizers compared, for a LLaMA. "sgd" is ClippedSGD without the clips, so that
    the two differ in nothing else.

    It has a group for each kind of tensor: embedding, lm_head, matrix (the others) and norm.
    multipliers, {kind: number}, scale the lr of a group, and its update_clip: the size of its steps
    whether or not that binds. group["peak"] holds the options that follow the schedule.
    """
    kinds = {"embedding": [model.model.embed_tokens.weight], "lm_head": [model.lm_head.weight],
             "matrix": [], "norm": []}
    rest = {p for params in kinds.values() for p in params}
    for p in [p for p in model.parameters() if p not in rest]:
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
