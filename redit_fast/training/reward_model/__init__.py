"""`redit-fast reward-model`: trainer.py is the page to begin with."""
