r"""Heavy-tailed class imbalance in images (Kunstner et al. 2024, arXiv 2402.19449).

    python -m experiments.images                # all three: an hour and a quarter on two cores
    # for a GPU, not run here: the paper's 10 bits; ResNet18 and ViT-S/16 on ImageNet
    python -m experiments.images mnist --bits=10 --steps=300
    python -m experiments.images resnet18 --data=ILSVRC/train --classes=1000 --most=1300 \
        --size=224 --epochs=90 --width=64
    python -m experiments.images vit --data=ILSVRC/train --classes=1000 --most=1300 \
        --size=224 --epochs=90 --batch=512 --patch=16 --width=384 --depth=12

mnist: ten digits beside many rare classes with barcodes, a CNN, full batch. resnet18, vit: classes
with frequencies ~ 1/k from a folder of images, and as many images of balanced classes. Each writes
results/images/NAME.md, .json and .png when it is done.

data/mnist holds MNIST's files; their 10,000 test images are enough up to 7 bits. data/omniglot
holds Omniglot's images_background_small1.zip and _small2.zip as they are. Any other folder has one
folder of .png or .jpg per class, at any depth, as ImageNet has. Images stay in memory: 150 KB each
at a size of 224.
"""
import gzip
import math
import os
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from experiments.heavy_tails import (
    BF16, DEVICE, Problem, at_least, make_optimizer, page, take_step, tune)
from experiments.heavy_tails import main as command_line
from loader import UserError
from metrics import finite, frequency_groups

METHODS = ("GD", "GD, momentum", "sign descent", "Adam", "clipped SGD")
# where the search for their step sizes starts: for MNIST at the paper's values, the others are ours
STARTS = {"Barcoded MNIST": (10**-1.5, 10**-2, 10**-2, 10**-2.5, 1e-3),
          "ResNet18": (10**-0.5, 10**-1.5, 1e-3, 1e-3, 1e-3),
          "ViT": (10**-0.5, 10**-1.5, 1e-4, 1e-3, 1e-3)}
SHOWN = METHODS[1:]  # in the picture


# ---- networks ----

class Pixels(nn.Module):
    """Bytes [n, channels, height, width] to floats from `low` to 1."""

    def __init__(self, low):
        super().__init__()
        self.low = low

    def forward(self, x):
        x = x.float() * ((1 - self.low) / 255) + self.low
        return x.contiguous(memory_format=torch.channels_last)


def cnn(classes):
    """The paper's, for MNIST."""
    return nn.Sequential(
        Pixels(0), nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 100, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4900, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. The first block of a stage halves the image and
    doubles the width; its shortcut is a 1x1 convolution."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes, width=64):
    """He et al. 2015: 11,689,512 parameters with 1,000 classes, as torchvision's."""
    layers = [Pixels(-1), nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width),
              nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
              BasicBlock(width, width, 1), BasicBlock(width, width, 1)]
    for w in (width, 2 * width, 4 * width):
        layers += [BasicBlock(w, 2 * w, 2), BasicBlock(2 * w, 2 * w, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(8 * width, classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


class ViT(nn.Module):
    """The simple ViT of Beyer et al. 2022 (arXiv 2205.01580): the mean over the patches in place of
    a class token, and fixed sine and cosine positions of rows and columns. Heads have 64 numbers.
    At the sizes of ViT-S/16 (224, 16, 384, 12) with 1,000 classes it has 21,974,632 parameters."""

    def __init__(self, classes, size, patch, width, depth):
        super().__init__()
        self.pixels, self.embed = Pixels(-1), nn.Conv2d(3, width, patch, patch)
        side = size // patch
        angle = torch.arange(side)[:, None] / 10_000 ** torch.linspace(0, 1, width // 4)
        wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
        rows, columns = wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)
        self.register_buffer("position", torch.cat([rows, columns], dim=1))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0, activation="gelu", batch_first=True,
            norm_first=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(self.pixels(x)).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


# ---- MNIST ----

def read_mnist(folder, bits=3):
    """Images uint8 [n, 28, 28], labels uint8 [n] and "test" or "training": of the test set up to 7
    bits, of the training set beyond or if it alone is there. Its files are gzip'd IDX."""
    folder, parts = Path(folder), {"t10k": "test", "train": "training"}
    there = [name for name in parts if (folder / f"{name}-images-idx3-ubyte.gz").exists()]
    name = "train" if "train" in there and (bits > 7 or len(there) == 1) else "t10k"
    arrays = []
    for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1)):
        path = folder / f"{name}-{kind}-ubyte.gz"
        try:
            data = gzip.decompress(path.read_bytes())
            if data[:4] != bytes([0, 0, 8, ndim]):
                raise ValueError("not an IDX file of bytes")
            sizes = np.frombuffer(data, ">u4", count=ndim, offset=4)
            arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(sizes))
        except (OSError, EOFError, ValueError, zlib.error) as e:
            raise UserError(f"cannot read {path} ({e}): get MNIST's files by `python "
                            "data/prepare.py mnist --out=DIR`, DIR a new folder, and give "
                            "--data=DIR") from None
    images, labels = arrays
    if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        raise UserError(f"{folder} has images of {images.shape} and {len(labels)} labels up to "
                        f"{labels.max(initial=0)}: prepare MNIST again in another folder")
    return images, labels, parts[name]


def barcoded(images, labels, bits, each=5):
    """Images uint8 [n, 28, 28] and their classes int64 [n]. Half (at 10 bits somewhat less) are
    digits, classes 0 to 9; class 10 + 10 * code + digit has `each` images of a digit with `code` in
    the first `bits` pixels of row 0. Which these are, and that all ten digits are equally frequent,
    is ours."""
    rng = np.random.default_rng(0)
    digits = [np.flatnonzero(labels == digit) for digit in range(10)]
    many = min(each * 2**bits, 5000)  # the paper's 5,000 at 10 bits
    if min(map(len, digits)) < many:
        raise UserError(f"there are {[len(d) for d in digits]} of the digits, and --bits={bits} "
                        f"needs {many} of each: choose fewer bits, or more images")
    plain = np.concatenate([rng.permutation(d)[:many] for d in digits])
    chosen = np.concatenate([rng.permutation(d)[:each] for _ in range(2**bits) for d in digits])
    code = np.repeat(np.arange(2**bits), 10 * each)
    marked = images[chosen]
    marked[:, 0, :bits] = 255 * (code[:, None] >> np.arange(bits) & 1)
    classes = np.concatenate([labels[plain].astype(np.int64), 10 + 10 * code + labels[chosen]])
    return np.concatenate([images[plain], marked]), classes


# ---- a folder of images ----

def image_files(folder):
    """{class: its images}, both sorted. A class is a folder that holds images. Zip files are read
    as they are, without their top folders: Omniglot's two have 50 classes in common."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        files = {path.relative_to(folder).as_posix(): path}
        if path.suffix == ".zip":
            try:
                archive = zipfile.ZipFile(path)
            except (OSError, ValueError, zipfile.BadZipFile) as e:
                raise UserError(f"cannot read {path} ({e}): copy it again") from None
            tops = {name.partition("/")[0] for name in archive.namelist()}
            top = f"{tops.pop()}/" if len(tops) == 1 else ""
            files = {name.removeprefix(top): zipfile.Path(archive, name)
                     for name in archive.namelist()}
        for name, file in files.items():
            kind = Path(name).suffix.lower()
            if kind in (".png", ".jpg", ".jpeg") and not Path(name).name.startswith("."):
                found.setdefault(os.path.dirname(name), {})[name] = file
    found.pop("", None)
    return {label: [file for _, file in sorted(files.items())]
            for label, files in sorted(found.items())}


def choose_classes(folder, classes, seed):
    """The images of `classes` classes in random order, the one to be the most frequent first."""
    found = image_files(folder)
    if len(found) < classes:
        raise UserError(
            f"{folder} has {len(found)} folders with .png or .jpg images, --classes={classes}: put "
            "Omniglot's images_background_small1.zip and _small2.zip (python/ of "
            "github.com/brendenlake/omniglot) into it, or choose another --data or --classes")
    order = np.random.default_rng(seed).permutation(len(found))[:classes]
    chosen = {list(found)[i]: list(found.values())[i] for i in order}
    seen = {}
    for label, files in chosen.items():
        if (other := seen.setdefault(read_image(files[0], 32).tobytes(), label)) != label:
            raise UserError(f"{folder}: {label} and {other} begin with the same image: keep one")
    return list(chosen.values())


def heavy_tailed(classes, most):
    """The number of samples of each class, proportional to 1/k, rounded down."""
    return most // np.arange(1, classes + 1)


def balanced(counts):
    """As many samples in all, equally many of each class, or one more."""
    each, rest = divmod(counts.sum(), len(counts))
    return each + (np.arange(len(counts)) < rest)


def read_image(file, size, place=(0.5, 0.5)):
    """uint8 [3, size, size]: resized so that the shorter side is 8/7 of `size`, then cropped, in
    the middle or at another place from (0, 0) to (1, 1)."""
    try:
        with file.open("rb") as opened:
            image = Image.open(opened).convert("RGB")
    except Exception as e:  # damaged images fail in many ways
        raise UserError(f"{file} is not an image that Pillow can read ({type(e).__name__}): "
                        "replace or remove it") from None
    scale = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    x, y = (round(at * (side - size)) for at, side in zip(place, (width, height)))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((x, y, x + size, y + size))).transpose(2, 0, 1)


def sample(classes, counts, size, seed):
    """Images uint8 [n, 3, size, size] and labels int64 [n], where class k has counts[k] images.
    If it has fewer, they are used again, each time with another crop."""
    rng, images = np.random.default_rng(seed), []
    for files, count in zip(classes, counts):
        order = rng.permutation(len(files))
        for i in range(count):
            place = (0.5, 0.5) if i < len(files) else rng.random(2)
            images.append(read_image(files[order[i % len(files)]], size, place))
    return np.stack(images), np.repeat(np.arange(len(counts)), counts)


# ---- training ----

def image_problem(make_net, images, labels, chunk=10**6):
    """Groups are tenths of the samples by class frequency; those left empty are dropped."""
    labels = torch.from_numpy(labels)
    group = frequency_groups(labels.bincount()).unique(return_inverse=True)[1]
    torch.manual_seed(0)
    net = make_net(len(group)).to(DEVICE)
    return Problem(net, torch.from_numpy(images).to(DEVICE), labels.to(DEVICE), group.to(DEVICE),
                   chunk=chunk, bf16=BF16)


def train(problem, name, step_size, epochs, batch):
    """Returns the mean loss [epochs], nats, and loss and accuracy of each group [epochs, groups],
    of all samples as they were before the step that used them. All are infinite from the epoch on
    in which a loss is not finite: the run diverged."""
    optimizer = make_optimizer(problem, name, step_size)
    n, group = len(problem.labels), problem.group[problem.labels]
    mean = torch.full((epochs,), math.inf)
    by_group = torch.full((2, epochs, int(group.max()) + 1), math.inf)
    shuffle = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        losses, correct = torch.zeros(2, n, device=DEVICE)
        order = torch.randperm(n, generator=shuffle).to(DEVICE)
        for rows in order.tensor_split(math.ceil(n / batch)):
            losses[rows], hits = problem.backward(rows)
            correct[rows] = hits.float()
            take_step(problem, name, optimizer)
        if not losses.isfinite().all():
            break
        mean[epoch] = losses.mean()
        for values, out in zip((losses, correct), by_group):
            out[epoch] = group.bincount(values) / group.bincount()
    return mean, *by_group


def compare(title, caption, data, make_net, epochs, batch=None, chunk=10**6):
    """The page of all methods on data sets {label: (images, labels)}, of which the first is the
    heavy-tailed one and the second its control. Without `batch` all images form one batch."""
    runs, rows = {}, []
    for label, (images, labels) in data.items():
        for method, start in zip(METHODS, STARTS[title], strict=True):
            def run(step_size):
                problem = image_problem(make_net, images, labels, chunk)
                return train(problem, method, step_size, epochs, batch or len(labels))
            name = f"S{method}" if batch and method.startswith("GD") else method
            step_size, mean, losses, accuracies = tune(run, f"{label}, {name}", start)
            runs[label, method] = f"{name}\nstep size {step_size:.3g}", losses, accuracies
            rows.append({
                "classes": label, "method": name, "step size": step_size, "loss": mean[-1].item(),
                "loss of the most frequent": losses[-1, 0].item(),
                "loss of the rarest": losses[-1, -1].item(),
                "accuracy of the most frequent": accuracies[-1, 0].item(),
                "accuracy of the rarest": accuracies[-1, -1].item()})

    tail, control = data

    def draw(axes):
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        panels = ((tail, 1, "loss (nats)"), (tail, 2, "accuracy"), (control, 1, "loss (nats)"))
        for line, (label, index, unit) in zip(axes, panels):
            top = 1.3 * math.log(data[label][1].max() + 1) if index == 1 else 1
            for ax, method in zip(line, SHOWN):
                y = runs[label, method][index]
                ax.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 1, y.shape[1])))
                ax.plot(y)
                ax.set(ylim=(0, top), xlabel="epoch" if batch else "step",
                       ylabel=f"{label}: {unit}")
                if index == 1:
                    ax.set_title(runs[label, method][0])
                ax.label_outer()
        axes[0, 0].figure.colorbar(
            ScalarMappable(cmap="viridis"), ax=axes, location="bottom", shrink=0.5, ticks=[],
            label="groups of classes, from the most frequent to the rarest")

    def ends(classes, key):
        return ", ".join(f"{row[key]:.2f} ({row['method']})" for row in rows
                         if row["classes"] == classes)

    caption += (
        f" Classes are in {runs[tail, method][1].shape[1]} groups by frequency, each with about a "
        f"tenth of the images, or one class. Here the loss of the rarest group ends at "
        f"{ends(tail, 'loss of the rarest')} nats, and with {control} the mean loss at "
        f"{ends(control, 'loss')}. One run of {epochs} {'epochs' if batch else 'steps'} per row, "
        "at the best step size of a grid in factors of sqrt(10). Losses and accuracies are of the "
        "training images, each before the step that uses it. "
        f"{'Weights in fp32, the rest in bfloat16.' if BF16 else 'All in fp32.'}")
    result = page(f"{title}: loss and accuracy by class frequency", caption, rows, draw,
                  (3, len(SHOWN)))
    for row, (_, losses, accuracies) in zip(result.rows, runs.values()):
        row |= {"losses of all groups": finite(losses[-1].tolist()),
                "accuracies of all groups": finite(accuracies[-1].tolist())}
    return result


def mnist(bits, steps, data):
    images, labels, part = read_mnist(data, bits)
    images, classes = barcoded(images, labels, bits)
    images, marked = images[:, None], classes >= 10
    sets = {"digits and barcodes": (images, classes),
            "barcodes alone": (images[marked], classes[marked] - 10)}
    caption = (
        f"Barcoded MNIST, {bits} bits: {len(images):,} images, from the {part} images, of "
        f"{classes.max() + 1:,} classes, a CNN, full batch. Kunstner et al. 2024 (10 bits): GD "
        "does not learn the rare classes, sign descent and Adam do. Clipped SGD (SGD-LL) is not in "
        "that paper.")
    return compare("Barcoded MNIST", caption, sets, cnn, steps,
                   chunk=100 if DEVICE == "cpu" else 10_000)


def folder_page(title, make_net, data, classes, most, size, epochs, batch, seed, more=""):
    chosen, counts = choose_classes(data, classes, seed), heavy_tailed(classes, most)
    if counts[-1] == 0:
        raise UserError(f"--most={most} leaves nothing for the rarest of {classes} classes: give "
                        f"at least --most={classes}")
    if counts.sum() // math.ceil(counts.sum() / batch) < 2:
        raise UserError(f"--batch={batch} leaves one image in a batch, whose variance is 0: give a "
                        "larger one")
    sets = {"heavy-tailed": sample(chosen, counts, size, seed),
            "balanced classes": sample(chosen, balanced(counts), size, seed)}
    caption = (
        "Kunstner et al. 2024, on ImageNet with class frequencies ~ 1/k (no settings are "
        f"published): SGD leaves the rare classes behind, Adam does not{more}. Clipped SGD "
        f"(SGD-LL) is not in that paper. {counts.sum():,} images of {classes} classes of "
        f"{data.name}, where class k has {most}/k, if need be the same images cropped again; and "
        f"as many of balanced classes. {size} x {size} pixels, batches of at most {batch}, "
        f"{sum(p.numel() for p in make_net(classes).parameters()):,} parameters.")
    return compare(title, caption, sets, make_net, epochs, batch)


def resnet18_page(width, **settings):
    return folder_page("ResNet18", partial(resnet18, width=width), **settings)


def vit_page(patch, width, depth, size, **settings):
    if size % patch or width % 64:
        raise UserError(f"--size={size} must be a multiple of --patch={patch}, and --width={width} "
                        "of 64")
    make_net = partial(ViT, size=size, patch=patch, width=width, depth=depth)
    return folder_page("ViT", make_net, size=size, **settings,
                       more="; on all of ImageNet, which is balanced, the two are level")


# in batches of 128, SGD with momentum and Adam both have ResNet18 know every image in 20 epochs
FOLDER = {"data": Path("data/omniglot"), "classes": 242, "most": 242, "size": 32, "seed": 0}
EXPERIMENTS = {
    "mnist": partial(mnist, bits=3, steps=200, data=Path("data/mnist")),
    "resnet18": partial(resnet18_page, **FOLDER, epochs=15, batch=512, width=32),
    "vit": partial(vit_page, **FOLDER, epochs=30, batch=128, patch=8, width=128, depth=4)}
SETTINGS = {
    "data": {"type": Path, "help": "folder [data/mnist, data/omniglot]"},
    "bits": {"type": int, "choices": range(1, 11), "help": "of barcodes [3]"},
    "steps": {"type": at_least(1), "help": "full-batch steps [200]"},
    "classes": {"type": at_least(2), "help": "[242]"},
    "most": {"type": at_least(1), "help": "images of the most frequent class [242]"},
    "size": {"type": at_least(1), "help": "pixels [32]"},
    "epochs": {"type": at_least(1), "help": "[ResNet18 15, ViT 30]"},
    "batch": {"type": at_least(1), "help": "images per step [ResNet18 512, ViT 128]"},
    "seed": {"type": at_least(0), "help": "of the choice of images [0]"},
    # with fewer than 8 channels oneDNN writes out of bounds on AVX2 processors (its issue 6035)
    "width": {"type": at_least(8), "help": "[ResNet18 32, ViT 128]"},
    "patch": {"type": at_least(1), "help": "pixels [8]"},
    "depth": {"type": at_least(1), "help": "blocks [4]"}}

if __name__ == "__main__":
    command_line("images", __doc__, EXPERIMENTS, "all", SETTINGS, "images")
