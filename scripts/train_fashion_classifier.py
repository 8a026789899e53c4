"""Train the Fashion-MNIST classifier that the wheel carries (some minutes on two cores).

The last 5,000 training images are held out; the epoch with the best accuracy on them is kept. The test set is measured
once, at the end. An interrupted run goes on from `--checkpoint`.

    python scripts/train_fashion_classifier.py --out src/weightpatch/tasks/images/shipped/fashion-resnet.safetensors
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weightpatch.tasks.images import shifted_and_flipped
from weightpatch.tasks.images._fashion import MEAN, STD
from weightpatch.tasks.images._idx import read_idx
from weightpatch.tasks.images._labelled import normalised
from weightpatch.tasks.images.models import FashionResNet

HELD_OUT = 5000


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    pixels = read_idx(folder / f"{split}-images-idx3-ubyte.gz", dimensions=3).unsqueeze(1)
    return pixels, read_idx(folder / f"{split}-labels-idx1-ubyte.gz", dimensions=1).long()


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    right = 0
    for some, named in zip(torch.split(pixels, 500), torch.split(labels, 500), strict=True):
        right += int((model(normalised(some, MEAN, STD)).argmax(1) == named).sum())
    return right / len(labels)


class Run:
    """All that an interrupted run needs to go on."""

    def __init__(self, args: argparse.Namespace, steps: int) -> None:
        torch.manual_seed(args.seed)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.model = FashionResNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, args.lr, total_steps=args.epochs * steps, pct_start=0.2
        )
        self.epoch, self.best, self.best_epoch = 0, -1.0, 0
        self.best_weights: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "progress": (self.epoch, self.best, self.best_epoch),
            "best_weights": self.best_weights,
        }

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(self.state(), partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.epoch, self.best, self.best_epoch = state["progress"]
        self.best_weights = state["best_weights"]


def one_epoch(run: Run, pixels: Tensor, labels: Tensor, batch: int) -> float:
    run.model.train()
    order = torch.randperm(len(labels), generator=run.generator)
    total = 0.0
    batches = torch.split(order[: len(order) - len(order) % batch], batch)
    for chosen in batches:
        images = normalised(shifted_and_flipped(pixels[chosen], run.generator), MEAN, STD)
        with torch.autocast("cpu", torch.bfloat16):
            logits = run.model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[chosen])
        run.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimiser.step()
        run.schedule.step()
        total += float(loss.detach())
    return total / len(batches)


def train(args: argparse.Namespace) -> Run:
    pixels, labels = read(args.data, "train")
    held_pixels, held_labels = pixels[-HELD_OUT:], labels[-HELD_OUT:]
    pixels, labels = pixels[:-HELD_OUT], labels[:-HELD_OUT]
    run = Run(args, steps=len(labels) // args.batch)
    if args.checkpoint.exists():
        run.load(args.checkpoint)
    while run.epoch < args.epochs:
        began = time.monotonic()
        loss = one_epoch(run, pixels, labels, args.batch)
        run.epoch += 1
        now = accuracy(run.model, held_pixels, held_labels)
        if now > run.best:
            run.best, run.best_epoch = now, run.epoch
            run.best_weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
        run.save(args.checkpoint)
        seconds = time.monotonic() - began
        print(f"epoch {run.epoch:3d}  loss {loss:.4f}  held out {now:.4f}  {seconds:.1f} s", flush=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fashion-classifier.pt"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run = train(args)
    model = FashionResNet()
    model.load_state_dict(run.best_weights)
    record = {
        "accuracy_held_out": run.best,
        "accuracy_test": accuracy(model, *read(args.data, "t10k")),
        "best_epoch": run.best_epoch,
        "epochs": args.epochs,
        "held_out": HELD_OUT,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.out, metadata={"training": json.dumps(record, sort_keys=True)})
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
