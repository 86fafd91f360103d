"""Policy losses: the one definition, in plain PyTorch, without dispatch."""
