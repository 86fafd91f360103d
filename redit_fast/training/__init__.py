"""The trainer behind `redit-fast train`: config, data, rewards, rollouts, the loop, checkpoints and reports."""
