"""What a vLLM server loads so that redit-fast can give it weights: docs/integrations/vllm.md. vLLM 0.30 to 0.33.

    PYTHONPATH=examples vllm serve MODEL --worker-extension-cls vllm_weights.Weights ...

It needs nothing of redit-fast: copy it to where the server is.
"""

from pathlib import Path

from safetensors import safe_open


class Weights:
    """Becomes a part of vLLM's worker class: `self` is the worker, of which each GPU has one."""

    def redit_fast_load(self, folder):
        """Puts the weights of a folder of safetensors, under the names of Hugging Face, in the place of the model's.

        vLLM renames, merges and shards them as when it starts, into the same memory, which CUDA graphs have the
        addresses of.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no safetensors that the server can read: it needs the trainer's file system and user"
            )
        self.reload_weights(weights_iterator=tensors_of(files))
        weights = []
        for module in self.get_model().modules():
            weight = getattr(module, "weight", None)
            if any(weight is other for other in weights) and hasattr(module, "quant_method"):
                # A head that shares the embedding's weights: on the CPU it has a packed copy, which vLLM 0.32 forgets.
                module.quant_method.process_weights_after_loading(module)
            weights += [] if weight is None else [weight]
        return {"files": [file.name for file in files]}


def tensors_of(files):
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 it is no dictionary
                yield name, file.get_tensor(name)
