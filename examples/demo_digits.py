"""The whole path on real data: train dense, prune to 90 %, convert, fine-tune in CSB, save, load, compare, densify.

    python examples/demo_digits.py [--quick] [--device auto|cpu|cuda] [--seeds 3] [--out build/demo]

Prints one table on stdout (progress bars go to stderr) and draws the same numbers to OUT/digits.png.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import sys
import time
from pathlib import Path

import torch
from digits.measure import Bytes, bytes_held, latencies
from digits.net import PRUNED_LAYERS, DigitsNet, load_digits
from digits.report import Results, picture, table
from digits.training import Data, GradualPruning, Schedule, accuracy, copy_masked, fit, remove_masks

import torch_csb

QUICK = Schedule(dense_epochs=2, prune_epochs=2, tune_epochs=1)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 still gets its table
    schedule = QUICK if options.quick else Schedule()
    seeds = options.seeds or (1 if options.quick else 3)
    # cuDNN would round the dense convolutions' operands to TF32, and the comparison is in float32.
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    data = Data(*(t.to(device) for t in load_digits()))
    started = time.perf_counter()

    accuracies: dict[str, list[float]] = {"dense": [], "masked dense": [], "CSB": []}
    for seed in range(seeds):
        with progress(schedule.epochs, f"seed {seed + 1}/{seeds}") as bar:
            masked, csb, held = run_seed(seed, schedule, data, accuracies, bar)
    print(file=sys.stderr)
    keep_and_compare(csb, data, options.out / "digits.safetensors")

    with progress(8, "latency") as bar:
        rows = latencies(
            masked,
            remove_masks(copy_masked(masked, DigitsNet().to(device), PRUNED_LAYERS), PRUNED_LAYERS),
            csb,
            device=device,
            seconds=0.02 if options.quick else 0.25,
            on_case=lambda case: step(bar, case),
        )
    results = Results(machine(device), accuracies, held, rows)
    print(table(results))
    print(draw(results, options.out / "digits.png"))
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


def draw(results: Results, path: Path) -> str:
    try:
        picture(results, path)
    except ImportError:
        return "no picture: matplotlib is not installed here"
    return f"the same as a picture: {path}"


def run_seed(seed: int, schedule: Schedule, data: Data, accuracies: dict[str, list[float]], bar):
    """Append the accuracies of one seed; return the masked model, the CSB model and the bytes of each form."""
    torch.manual_seed(seed)
    model = DigitsNet().to(data.train_x.device)

    def train(phase: str, epochs: int, lr: float, on_step=None) -> torch.optim.Optimizer:
        return fit(
            model, data, epochs=epochs, lr=lr, on_step=on_step, on_epoch=lambda loss: step(bar, f"{phase}, {loss}")
        )

    held: dict[str, Bytes] = {}
    optimizer = train("dense", schedule.dense_epochs, schedule.dense_lr)
    accuracies["dense"].append(accuracy(model, data))
    held["dense"] = bytes_held(model, optimizer)

    pruning = GradualPruning([model.get_submodule(name) for name in PRUNED_LAYERS], schedule.sparsity)
    optimizer = train("pruning", schedule.prune_epochs, schedule.prune_lr, on_step=pruning)
    accuracies["masked dense"].append(accuracy(model, data))
    held["masked dense"] = bytes_held(model, optimizer)

    masked = copy_masked(model, DigitsNet().to(data.train_x.device), PRUNED_LAYERS)
    report = torch_csb.sparsify_(model, target=data.train_x.device.type)
    if seed == 0:
        # On a line of its own, which a bar in progress would share.
        print(f"\n{report}", file=sys.stderr)
    optimizer = train("fine-tuning in CSB", schedule.tune_epochs, schedule.tune_lr)
    accuracies["CSB"].append(accuracy(model, data))
    held["CSB"] = bytes_held(model, optimizer)
    return masked, model, held


def keep_and_compare(model: DigitsNet, data: Data, path: Path) -> None:
    """Save, load into a fresh net, densify: the loaded net must give the same bits, the dense one the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_csb.save(model, path)
    loaded = DigitsNet().to(data.test_x.device)
    torch_csb.load_into(loaded, path)
    dense = copy.deepcopy(loaded)
    torch_csb.densify_(dense)
    with torch.no_grad():
        expected, reloaded, densified = (net.eval()(data.test_x) for net in (model, loaded, dense))
    if not torch.equal(expected, reloaded):
        raise SystemExit("The net loaded from the file differs from the one that was saved.")
    torch.testing.assert_close(densified, expected, rtol=1e-4, atol=1e-4)
    worst = (densified - expected).abs().max().item()
    print(f"saved {path} ({path.stat().st_size / 1024:,.0f} KiB), loaded into a fresh net: outputs bit-equal")
    print(f"densified: largest difference of an output {worst:.1e}\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs: a check that everything runs")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seeds", type=int, default=0, help="number of seeds (3; 1 with --quick)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the picture and the model")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def progress(total: int, label: str):
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label} (no progress bar: tqdm is not installed here)", file=sys.stderr)
        return contextlib.nullcontext()
    return tqdm(total=total, desc=label, file=sys.stderr, dynamic_ncols=True)


def step(bar, text: str) -> None:
    if bar is not None:
        bar.set_postfix_str(text, refresh=False)
        bar.update()


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
