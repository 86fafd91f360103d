"""A supervised step of a causal LM of transformers, with its own loss and under `apply_to`: python -m
benchmarks.bench_apply

Forward pass, loss, backward pass and clipping of 8 sequences of 128 tokens (small: 32). A Qwen2 of two layers of width
128 with a vocabulary of 50257 (small: 2000), as wide in the head as GPT-2's, so that the head is what takes the time.
The gradient's norm is compared with that of float64.
"""

import torch

import redit_fast as rf
from benchmarks.bench_trl import SEQUENCES, WIDTH, a_model
from benchmarks.common import Candidate, clock, main, measure, show


def candidates(vocabulary, length):
    tokens = torch.randint(vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(1))

    def step(model):
        model(tokens, labels=tokens).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        model.zero_grad()
        return norm

    expected = step(a_model(vocabulary).double())

    def candidate(name, applied):
        def make():
            model = a_model(vocabulary)
            if applied:
                rf.apply_to(model)

            def run():
                with clock:
                    norm = step(model)
                assert abs(norm / expected - 1) < 1e-4, (norm, expected)

            return run

        head = vocabulary * WIDTH
        return Candidate(name, 4 * 2 * head, make, not applied, 3 * 2 * SEQUENCES * length * head)

    return [candidate("apply_to", True), candidate("transformers", False)]


def tables(small):
    sizes = (2000, 32) if small else (50257, 128)
    title = f"SFT step, vocabulary {sizes[0]}, {SEQUENCES} sequences of {sizes[1]} tokens, float32"
    results = {title: measure(candidates(*sizes), rounds=5)}
    show(title, results[title])
    return results


if __name__ == "__main__":
    main(tables)
