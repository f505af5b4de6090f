"""SGD with two clips, which let it bear a learning rate of 100 ("SGD-LL", arXiv 2605.17787), and its baselines.

Needs torch and nothing else: copy this file into your own project.

    >>> head = [model.lm_head.weight]
    >>> body = [p for p in model.parameters() if p is not model.lm_head.weight]
    >>> optimizer = ClippedSGD([{"params": body}, {"params": head, "token_clip": 1e-3}], lr=100.0)
"""
import torch


def update(params, grads, moments, lr, momentum, token_clip, update_clip):
    """One step on lists of tensors, in place, as the paper states it. Returns the steps taken (fp32, one a tensor) and
    the factors of the rows (fp32, [rows, 1] a tensor), each list empty where its clip is off."""
    steps, rows = [], []
    for p, g, m in zip(params, grads, moments):
        if momentum:
            m.lerp_(g, 1 - momentum)
        u, step = m, lr
        if token_clip is not None:
            norm = torch.linalg.vector_norm(u, dim=1, keepdim=True, dtype=torch.float32)
            rows.append((token_clip / norm).clamp(max=1.0))  # a row of zeros: x / 0 = inf, so 1
            u = u * rows[-1]
        if update_clip is not None:
            rms = torch.linalg.vector_norm(u, dtype=torch.float32) / u.numel() ** 0.5
            step = (update_clip / rms).clamp(max=lr)
            steps.append(step)
        p.sub_(u * step)
    return steps, rows


def update_foreach(params, grads, moments, lr, momentum, token_clip, update_clip):
    """The same in one call a list where PyTorch has one, and without a temporary: clips only shrink, so w <- w - c * m
    with a number c a tensor, or one a row, and no clipped copy of m is made."""
    steps, rows = [], []
    if momentum:
        torch._foreach_lerp_(moments, grads, 1 - momentum)
    if token_clip is not None or update_clip is not None:  # row by row is also the quick way to a tensor's norm
        norms = [torch.linalg.vector_norm(m, dim=-1, keepdim=True, dtype=torch.float32) for m in moments]
    if token_clip is not None:
        rows = [(token_clip / norm).clamp_(max=1.0) for norm in norms]
    if update_clip is not None:
        if rows:
            torch._foreach_mul_(norms, rows)
        steps = torch._foreach_reciprocal(torch._foreach_norm(norms))
        torch._foreach_mul_(steps, [update_clip * m.numel() ** 0.5 for m in moments])
        torch._foreach_clamp_max_(steps, lr)
    scales = torch._foreach_mul(rows, steps or lr) if rows else steps
    if scales:
        torch._foreach_addcmul_(params, moments, scales, value=-1)
    else:
        torch._foreach_add_(params, moments, alpha=-lr)
    return steps, rows


class ClippedSGD(torch.optim.Optimizer):
    """SGD with a per-row clip of the gradient and a per-tensor clip of the update (arXiv 2605.17787 and its release).

    For each tensor, in this order:
        m <- momentum * m + (1 - momentum) * g     zero start, no bias correction, no Nesterov
        u <- m, its rows rescaled to an L2 norm of at most token_clip
        u <- u, rescaled so that lr * rms(u) is at most update_clip
        w <- w - lr * u
    The clips leave m as it is. With both off this is torch.optim.SGD with dampening = momentum, whose lr is
    1 / (1 - momentum) times that of SGD without dampening. State: one tensor a parameter, none if momentum is 0.

    Args (each also an option of a parameter group):
        lr: step, in weight units per gradient unit; the paper has 100 to 300.
        momentum: beta of the exponential moving average, in [0, 1).
        token_clip: largest L2 norm of one row of m, in gradient units (paper: 1e-3), or None. Rows are token classes,
            so this is meant for the group of the output layer's weight [vocab, hidden] alone, and needs 2-D tensors.
        update_clip: largest RMS of one tensor's update, in weight units (paper: 5e-4, at 1B 2e-4), or None. It does not
            follow the lr: while it binds, a schedule changes nothing.
        foreach: one call for all tensors of a group (default), or one tensor after the other.

    No host synchronisation. With `report = True`, step() leaves in `clipped` the share of the tensors and of the rows
    that it clipped, 0-d tensors on the device (None where the clip is off).
    """

    report, clipped = False, {}

    def __init__(self, params, lr, momentum=0.9, token_clip=None, update_clip=5e-4, foreach=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, token_clip=token_clip, update_clip=update_clip,
                                      foreach=foreach))

    def add_param_group(self, param_group):
        group = {**self.defaults, **param_group}
        if not group["lr"] >= 0:
            raise ValueError(f"lr must be at least 0, not {group['lr']}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1), not {group['momentum']}")
        for name in ("token_clip", "update_clip"):
            if group[name] is not None and not group[name] > 0:
                raise ValueError(f"{name} must be above 0, not {group[name]}; None switches it off")
        super().add_param_group(param_group)
        if group["token_clip"] is not None and any(p.dim() != 2 for p in self.param_groups[-1]["params"]):
            raise ValueError("token_clip needs 2-D parameters, a row a token: set it on the output layer's group")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps, rows = [], []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                raise RuntimeError("ClippedSGD takes dense gradients only")
            moments = grads
            if group["momentum"]:
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                moments = [self.state[p]["momentum_buffer"] for p in params]
            run = update_foreach if group["foreach"] else update
            s, r = run(params, grads, moments, *(group[k] for k in ("lr", "momentum", "token_clip", "update_clip")))
            steps += [x < group["lr"] for x in s] if self.report else []
            rows += [x < 1 for x in r] if self.report else []
        if self.report:
            self.clipped = {"tensors": torch.stack(steps).float().mean() if steps else None,
                            "rows": torch.cat(rows).float().mean() if rows else None}
        return loss


def build(name, model, lr, momentum=0.9, token_clip=1e-3, update_clip=5e-4, beta1=0.9, beta2=0.95, weight_decay=0.0):
    """The optimizers under comparison, for a model whose output layer is `lm_head`. "sgd" is ClippedSGD without the
    clips, so that nothing but the clips differs."""
    head = [model.lm_head.weight]
    groups = [{"params": [p for p in model.parameters() if p is not head[0]]}, {"params": head}]
    if name == "clipped_sgd":
        groups[1]["token_clip"] = token_clip
        return ClippedSGD(groups, lr, momentum, update_clip=update_clip)
    if name == "sgd":
        return ClippedSGD(groups, lr, momentum, update_clip=None)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, (beta1, beta2), eps=1e-8, weight_decay=weight_decay, fused=True)
    raise ValueError(f"no optimizer {name}: there are clipped_sgd, sgd and adamw")
