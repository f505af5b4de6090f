"""Barcoded MNIST: heavy-tailed classes in images (arXiv 2402.19449, section 2 and appendix).

    python mnist.py --data=data/mnist             # or `make mnist`: 4 bits, 170 classes, 1,600 images
    python mnist.py --data=data/mnist --bits=10   # the paper's size: 10,250 classes, 101,200 images; for a GPU

Half of the images are MNIST's, ten frequent classes. The other half are of rare classes of five images each: a digit
with a barcode in the corner, one class for each pair of the two. A small CNN learns them all at once, full batch, and
the question is which optimizer learns the rare ones. The data are the four files of MNIST as they are
(`python data/prepare.py mnist`), gzip'd or not. Writes results/toy/mnist.md, .json and .png.
"""
import argparse
import gzip
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from loader import DataError
from run import hardware
from sweep import Page, agree, markdown, number, write
from toy import RULES, best_step, finite, step_sizes

# The paper's step sizes at 10 bits; at fewer the search starts there, and for clipped SGD always [ours].
STEPS = {"GD": 10**-1.5, "GD, momentum": 10**-2, "normalised GD": 1.0, "normalised GD, momentum": 1.0,
         "sign": 10**-2, "sign, momentum": 10**-3.5, "Adam, beta1 0": 10**-2.5, "Adam": 10**-2.5, "clipped SGD": 1e-3}


def read_idx(folder, name):
    """The array of bytes in an IDX file, NAME or NAME.gz: uint8 in its own shape. DataError names the file."""
    path = next((p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise DataError(f"{folder} has neither {name} nor {name}.gz: `python data/prepare.py mnist --out={folder}` "
                         "downloads MNIST's four files, or put them there yourself")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            data = f.read(100_000_000)  # twice the largest
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} cannot be read ({e}): delete it and download it again") from None
    rank = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = np.frombuffer(data[4:4 + 4 * rank], dtype=">u4").tolist() if len(data) >= 4 + 4 * rank else []
    if not 0 < rank < 4 or len(shape) != rank or len(data) != 4 + 4 * rank + math.prod(shape):
        raise DataError(f"{path} is no whole IDX file of bytes: delete it and download it again")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape).copy()  # may be written to


def barcoded(images, labels, bits, each=5, seed=0):
    """Digits beside digits with barcodes: images uint8 [n, 28, 28] and their classes int64 [n].

    Classes 0 to 9 are the digits, as many of each as make half of the set; class 10 + 10 * code + digit is a digit with
    `code` in the first `bits` pixels of row 0, `each` images of it. Which images these are, and that all ten digits are
    equally frequent, is ours. DataError if there are too few.
    """
    rng, digits = np.random.default_rng(seed), [np.flatnonzero(labels == d) for d in range(10)]
    many = min(each * 2**bits, 5000)  # the paper's 5,000 at 10 bits
    if min(map(len, digits)) < many:
        raise DataError(f"there are {[len(d) for d in digits]} of the digits, and --bits={bits} needs {many} of each")
    plain = np.concatenate([rng.permutation(d)[:many] for d in digits])
    chosen = np.concatenate([rng.permutation(d)[:each] for _ in range(2**bits) for d in digits])
    marked, code = images[chosen].copy(), np.repeat(np.arange(2**bits), 10 * each)
    marked[:, 0, :bits] = 255 * (code[:, None] >> np.arange(bits) & 1)
    return (np.concatenate((images[plain], marked)),
            np.concatenate((labels[plain].astype(np.int64), 10 + 10 * code + labels[chosen])))


class Barcoded:
    """The CNN of the paper and all of the data, as toy.descend wants a model: groups 0, the digits, and 1, the rest."""

    def __init__(self, images, labels, device="cpu", rows=100):
        self.X = torch.from_numpy(images).to(device)
        self.labels, self.rows = torch.from_numpy(labels).to(device), rows
        self.classes = int(self.labels.max()) + 1
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                                 nn.Conv2d(32, 100, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                                 nn.Flatten(), nn.Linear(4900, self.classes)).to(device)

    def parameters(self):
        return [self.net[-1].weight, *list(self.net.parameters())[:-2], self.net[-1].bias]

    def gradients(self):
        """Sets the gradients of the mean loss; returns the losses of the images [n]."""
        self.net.zero_grad()
        losses = []
        for x, y in zip(self.X.split(self.rows), self.labels.split(self.rows)):
            part = F.cross_entropy(self.net(x[:, None].float() / 255), y, reduction="none")
            (part.sum() / len(self.X)).backward()
            losses.append(part.detach())
        return torch.cat(losses)

    @torch.no_grad()
    def error(self, images, labels):
        """The share of these digits whose most probable class is another."""
        wrong = 0
        for x, y in zip(torch.from_numpy(images).split(self.rows), torch.from_numpy(labels).split(self.rows)):
            wrong += (self.net(x[:, None].to(self.X.device).float() / 255).argmax(1).cpu() != y).sum().item()
        return wrong / len(labels)

    def by_group(self, losses):
        new = self.labels >= 10
        return torch.stack((losses[~new].mean(), losses[new].mean())).cpu()


def read_mnist(folder, part):
    """Images uint8 [n, 28, 28] and labels uint8 [n] of MNIST's "train" or "t10k". DataError names what is wrong."""
    images, labels = (read_idx(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.shape != (len(labels), 28, 28) or labels.ndim > 1 or labels.max() > 9:
        raise DataError(f"{folder}: {part} has images of {list(images.shape)} and labels of {list(labels.shape)}, the "
                         f"largest {labels.max()}, not 28 x 28 pixels and a digit each: download it again")
    return images, labels


def mnist(args):
    data, test = barcoded(*read_mnist(args.data, "train"), args.bits), read_mnist(args.data, "t10k")
    looks = sorted({*range(0, args.steps, max(1, args.steps // 60)), args.steps})

    def make():
        return Barcoded(*data, args.device, 100 if args.device == "cpu" else 10_000)
    found = {}
    for name, start in STEPS.items():
        search = args.bits < 10 or name == "clipped SGD"
        lr, model, total, groups = best_step(name, make, RULES[name][0], start, args.steps, looks, search)
        found[name] = lr, total, groups, model.error(*test)
    fall = {name: (1 - groups[-1] / groups[0]).tolist() for name, (_, _, groups, _) in found.items()}
    rows = [{"method": name, "step_size": lr, "loss": finite(total[-1]), "old": finite(groups[-1][0].item()),
             "new": finite(groups[-1][1].item()), "new_at_start": groups[0][1].item(), "test_error": error}
            for name, (lr, total, groups, error) in found.items()]
    table = markdown(("method", "step size", "loss", "ten digits", "barcoded classes", "fall of the barcoded",
                      "error on the test digits"),
                     [(r["method"], f"{r['step_size']:.3g}", number(r["loss"], ".3f"), f"{r['old']:.3f}",
                       f"{r['new']:.3f}", f"{fall[r['method']][1]:.0%}", f"{r['test_error']:.1%}") for r in rows])

    def draw(axes):
        for each, (name, (lr, _, groups, _)) in zip(axes.flat, found.items()):
            each.plot(looks, groups[:, 0], color="black", label="ten digits")
            each.plot(looks, groups[:, 1], "--", color="#d55e00", label="barcoded classes")
            each.set(title=f"{name}, {lr:.3g}", xlabel="step", ylim=(0, 1.3 * groups[0].max().item()))
        for each in axes[:, 0]:
            each.set_ylabel("loss (nats)")
        axes[0, 0].legend()
    slow, fast = max(fall["GD"][1], fall["normalised GD"][1]), min(fall["sign"][1], fall["Adam"][1])
    n, classes = len(data[0]), int(data[1].max()) + 1
    return Page(table, rows, [], f"Barcoded MNIST, {args.bits} bits: {n:,} images of {classes:,} classes, {args.steps} "
                f"full-batch steps of a CNN, one run each, at {step_sizes(args.bits == 10)}. Paper B (10 bits): GD "
                "does not learn the rare classes, sign descent and Adam do. Here their loss falls by at most "
                f"{slow:.0%} under GD and normalised GD, by at least {fast:.0%} under sign descent and Adam: "
                f"{agree(slow < 0.5 < fast)}. Clipped SGD, which the "
                f"paper does not have: {fall['clipped SGD'][1]:.0%}.", draw, (3, 3))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/mnist", help="folder with MNIST's four files")
    parser.add_argument("--bits", type=int, default=4, choices=range(1, 11), metavar="N", help="of the barcode [4]")
    parser.add_argument("--steps", type=int, default=300, help="the paper's [300]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.steps < 1 or args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--steps starts at 1, and --device=cuda needs a GPU")
    began = time.perf_counter()
    try:
        page = mnist(args)
    except DataError as e:
        sys.exit(f"mnist.py: {e}")
    size = f"-bits{args.bits}" * (args.bits != 4)
    write(Path(f"results/toy/mnist{size}"), page, page.caption,
          f"{hardware(args.device)}; torch {torch.__version__}; "
          f"{time.strftime('%Y-%m-%d')}; {time.perf_counter() - began:.0f} s",
          f"python mnist.py --bits={args.bits} --steps={args.steps}")


if __name__ == "__main__":
    main()
