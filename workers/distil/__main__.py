"""`python -m workers.distil`: make a teacher for EfficientAD, and say how much it explains."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import engines.missing_packages  # noqa: F401 (it says what to install)
from engines.image import ImageLimits
from workers.commands import run
from workers.distil.teacher import Distil, distil
from workers.progress import Progress

SMALLEST_PX, LARGEST_PX = 64, 1024  # of image_size


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m workers.distil",
        description="Make a teacher for EfficientAD: a small network that describes patches of a"
        " picture as a large one (the backbone) does. Then: retrain.py --model efficientad"
        " --pretrained_pth teacher.pth. Half an hour on two cores gives a useful one.",
    )
    add = parser.add_argument
    add("--images", type=Path, nargs="+", required=True, metavar="PATH", help="folders of pictures,"
        " with all folders below them, or pictures; any, without labels: the more different, the"
        " better. Of your parts take good ones only")  # fmt: skip
    add("--out", type=Path, default=Distil.out, metavar="F.pth", help="where the teacher goes"
        " (default %(default)s)")  # fmt: skip
    add("--backbone", default=Distil.backbone, metavar="NAME", help="timm name of the network to"
        " imitate (default %(default)s)")  # fmt: skip
    add("--layers", nargs="+", metavar="L", help="its stages, such as layer2 layer3. Without it:"
        " those with a feature every 8 and every 16 pixels")  # fmt: skip
    add("--weights", metavar="F", help="weights of the backbone, .pth or .safetensors with timm or"
        " torchvision names. Without it: pretrained ones of an installed package, of timm's cache"
        " or of the hub. The word 'untrained' takes random ones, which teach little")  # fmt: skip
    add("--model_size", choices=("small", "medium"), default=Distil.model_size, help="of the"
        " EfficientAD model that is to have this teacher (default %(default)s)")  # fmt: skip
    add("--image_size", type=int, default=Distil.image_size, metavar="N", help="image_size of the"
        " EfficientAD model, pixels: how large parts look (default %(default)s)")  # fmt: skip
    add("--steps", type=int, default=Distil.steps, metavar="N", help="how long to learn; twice as"
        " many take twice as long (default %(default)s)")  # fmt: skip
    add("--batch", type=int, default=Distil.batch, metavar="N", help="cuts of pictures in a step"
        " (default %(default)s)")  # fmt: skip
    add("--learning_rate", type=float, default=Distil.learning_rate, metavar="X", help="the highest"
        " of the training (default %(default)s)")  # fmt: skip
    ImageLimits.add_flags(parser)
    parsed = parser.parse_args(arguments)
    parsed.limits = ImageLimits.of_flags(vars(parsed))
    if parsed.steps < 1 or parsed.batch < 1 or not parsed.learning_rate > 0:
        parser.error("--steps and --batch must be at least 1, and --learning_rate above 0")
    if not SMALLEST_PX <= parsed.image_size <= LARGEST_PX:
        parser.error(f"--image_size must be {SMALLEST_PX} to {LARGEST_PX}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    request = Distil(**vars(parse(arguments)))
    progress = Progress()

    def work() -> None:
        distil(request, progress)
        progress.say(f"written to {request.out}")

    return run(work, progress)


if __name__ == "__main__":
    sys.exit(main())
