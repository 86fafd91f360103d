"""The trainer behind `redit-fast train`: config, data, rewards, rollouts, the loop, checkpoints and reports."""

from redit_fast.extras import need

need("train", "redit_fast.training")
