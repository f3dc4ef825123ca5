"""Command line options that the training of every refiner has."""

import argparse
from dataclasses import replace

from flowturbo.command import natural, positive
from training.plan import Pace, TrainingConfig

_PLAN = ("steps", "batch", "learning_rate", "decay", "warmup", "seed", "clip", "ema_decay")


def plan_of(args: argparse.Namespace, usual: TrainingConfig) -> TrainingConfig:
    """`usual` with the options of `add_plan_options`. Raises PlanError."""
    return replace(usual, **{name: getattr(args, name) for name in (*_PLAN, "precision")})


def add_plan_options(parser: argparse.ArgumentParser, usual: TrainingConfig) -> None:
    """Adds the options of a plan, whose defaults are `usual`, and of its pace."""
    add, pace = parser.add_argument, Pace()
    add("--steps", type=positive, default=usual.steps, help="optimizer steps")
    add("--batch", type=positive, default=usual.batch, help="rows of all processes together")
    add("--learning-rate", type=float, default=usual.learning_rate, help="peak learning rate")
    add(
        "--decay",
        choices=("constant", "cosine"),
        default=usual.decay,
        help="decay of the learning rate",
    )
    add("--warmup", type=natural, default=usual.warmup, help="steps of learning rate warm-up")
    add("--seed", type=natural, default=usual.seed, help="seed of weights and draws")
    add("--clip", type=float, default=usual.clip, help="largest gradient norm; 0 means no limit")
    add("--ema-decay", type=float, default=usual.ema_decay, help="decay of the averaged weights")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        default=usual.precision,
        help="precision of matrix products",
    )
    add("--save-every-s", type=float, default=pace.save_every_s, help="seconds between saves")
    add("--log-every", type=positive, default=pace.log_every, help="steps between log entries")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of options that have one, and keeps the layout of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)
